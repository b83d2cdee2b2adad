/* rte_ring between two threads: one round of `total` elements from `source` (a power of two of them, walked round and
 * round, the first burst of them again at the end) in bursts, each side in its own thread. The consumer returns the ticks from the meeting to the last element.
 *
 * cdef
struct rte_ring *ring_create(unsigned size, int multi);
void ring_free(struct rte_ring *ring);
void ring_produce(struct rte_ring *ring, int multi, const uint64_t *source, uint64_t mask, uint64_t total,
                  unsigned burst, uint64_t *words);
uint64_t ring_consume(struct rte_ring *ring, int multi, uint64_t total, unsigned burst, uint64_t *words, uint64_t *sum);
*/
#include "peers.h"
#include <rte_ring.h>

struct rte_ring *ring_create(unsigned size, int multi)
{
    return rte_ring_create("bench", size, SOCKET_ID_ANY, multi ? 0 : RING_F_SP_ENQ | RING_F_SC_DEQ);
}

void ring_free(struct rte_ring *ring) { rte_ring_free(ring); }

/* `burst` and `multi` are constants wherever these are inlined, as a DPDK program would have them. */
static __rte_always_inline void produce(struct rte_ring *ring, int multi, const uint64_t *source, uint64_t mask,
                                        uint64_t total, const unsigned burst)
{
    for (uint64_t done = 0; done < total;) {
        void *const *from = (void *const *)(source + (done & mask));
        unsigned put;
        if (burst == 1)
            put = (multi ? rte_ring_mp_enqueue(ring, *from) : rte_ring_sp_enqueue(ring, *from)) == 0;
        else if (total - done >= burst)
            put = multi ? rte_ring_mp_enqueue_burst(ring, from, burst, NULL)
                        : rte_ring_sp_enqueue_burst(ring, from, burst, NULL);
        else
            put = multi ? rte_ring_mp_enqueue_burst(ring, from, total - done, NULL)
                        : rte_ring_sp_enqueue_burst(ring, from, total - done, NULL);
        if (!put)
            rte_pause();
        done += put;
    }
}

static __rte_always_inline uint64_t consume(struct rte_ring *ring, int multi, uint64_t total, const unsigned burst)
{
    void *taken[128];
    uint64_t sum = 0;
    for (uint64_t done = 0; done < total;) {
        unsigned got;
        if (burst == 1)
            got = (multi ? rte_ring_mc_dequeue(ring, taken) : rte_ring_sc_dequeue(ring, taken)) == 0;
        else
            got = multi ? rte_ring_mc_dequeue_burst(ring, taken, burst, NULL)
                        : rte_ring_sc_dequeue_burst(ring, taken, burst, NULL);
        if (!got)
            rte_pause();
        for (unsigned i = 0; i < got; i++)
            sum += (uint64_t)taken[i];
        done += got;
    }
    return sum;
}

#define BURSTS(call, multi) \
    switch (burst) { \
    case 1: call(multi, 1); break; \
    case 8: call(multi, 8); break; \
    case 32: call(multi, 32); break; \
    case 128: call(multi, 128); break; \
    }

void ring_produce(struct rte_ring *ring, int multi, const uint64_t *source, uint64_t mask, uint64_t total,
                  unsigned burst, uint64_t *words)
{
#define PRODUCE(multi, burst) produce(ring, multi, source, mask, total, burst)
    meet(words, 0);
    if (multi)
        BURSTS(PRODUCE, 1)
    else
        BURSTS(PRODUCE, 0)
}

uint64_t ring_consume(struct rte_ring *ring, int multi, uint64_t total, unsigned burst, uint64_t *words, uint64_t *sum)
{
#define CONSUME(multi, burst) *sum = consume(ring, multi, total, burst)
    meet(words, 1);
    uint64_t began = rte_rdtsc();
    if (multi)
        BURSTS(CONSUME, 1)
    else
        BURSTS(CONSUME, 0)
    return rte_rdtsc() - began;
}
