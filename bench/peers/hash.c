/* rte_hash: keys of 16 bytes, values of 8, one thread and no locks, hashed by CRC32C. A lookup function goes `passes`
 * times over `count` keys in bursts of 64 and returns its ticks; results (u64, all ones for what is not there) are kept
 * if there is room for them, and otherwise each burst overwrites the last.
 *
 * cdef
struct rte_hash *hash_make(const uint8_t *keys, const uint64_t *values, unsigned count, unsigned entries);
void hash_free(struct rte_hash *hash);
uint64_t hash_bulk(struct rte_hash *hash, const uint8_t *keys, unsigned count, unsigned passes, uint64_t *results);
uint64_t hash_hashed(struct rte_hash *hash, const uint8_t *keys, unsigned count, unsigned passes, uint64_t *results);
uint64_t hash_churn(struct rte_hash *hash, const uint8_t *keys, unsigned keys_count, unsigned count, uint64_t first,
                    unsigned behind);
*/
#include "peers.h"
#include <rte_hash.h>
#include <rte_hash_crc.h>
#include <stdio.h>

#define BURST 64
#define KEY 16

struct rte_hash *hash_make(const uint8_t *keys, const uint64_t *values, unsigned count, unsigned entries)
{
    char name[RTE_HASH_NAMESIZE];
    snprintf(name, sizeof(name), "bench %u", entries);
    struct rte_hash_parameters wanted = {.name = name, .entries = entries, .key_len = KEY,
                                         .hash_func = rte_hash_crc, .socket_id = SOCKET_ID_ANY};
    struct rte_hash *hash = rte_hash_create(&wanted);
    for (unsigned i = 0; hash && i < count; i++)
        if (rte_hash_add_key_data(hash, keys + KEY * i, (void *)values[i])) {
            rte_hash_free(hash);
            return NULL;
        }
    return hash;
}

void hash_free(struct rte_hash *hash) { rte_hash_free(hash); }

static inline uint64_t lookup(struct rte_hash *hash, const uint8_t *keys, unsigned count, unsigned passes,
                              uint64_t *results, int hashed)
{
    const void *at[BURST];
    hash_sig_t signatures[BURST];
    void *data[BURST];
    uint64_t hits, start = rte_rdtsc();
    for (unsigned pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < count; i += BURST) {
            for (unsigned j = 0; j < BURST; j++)
                at[j] = keys + KEY * (i + j);
            if (hashed) {
                for (unsigned j = 0; j < BURST; j++)
                    signatures[j] = rte_hash_crc(at[j], KEY, 0);
                rte_hash_lookup_with_hash_bulk_data(hash, at, signatures, BURST, &hits, data);
            } else
                rte_hash_lookup_bulk_data(hash, at, BURST, &hits, data);
            __asm__ volatile("" : : "r"(data) : "memory");
            for (unsigned j = 0; results && j < BURST; j++)
                results[i + j] = hits >> j & 1 ? (uint64_t)data[j] : UINT64_MAX;
        }
    return rte_rdtsc() - start;
}

uint64_t hash_bulk(struct rte_hash *hash, const uint8_t *keys, unsigned count, unsigned passes, uint64_t *results)
{
    return lookup(hash, keys, count, passes, results, 0);
}

uint64_t hash_hashed(struct rte_hash *hash, const uint8_t *keys, unsigned count, unsigned passes, uint64_t *results)
{
    return lookup(hash, keys, count, passes, results, 1);
}

/* Add `count` keys, from number `first` on, of `keys_count` that come round; delete, for each, the one `behind` ago. */
uint64_t hash_churn(struct rte_hash *hash, const uint8_t *keys, unsigned keys_count, unsigned count, uint64_t first,
                    unsigned behind)
{
    uint64_t start = rte_rdtsc();
    for (uint64_t i = first; i < first + count; i++) {
        rte_hash_add_key_data(hash, keys + KEY * (i % keys_count), (void *)i);
        if (i >= behind)
            rte_hash_del_key(hash, keys + KEY * ((i - behind) % keys_count));
    }
    return rte_rdtsc() - start;
}
