/* The C side of `bench forward`: full IPv4 forwarding compute over rte_fib, written as a DPDK engineer would,
 * burst-wise with prefetch. Compiled twice: into the library of all peers by gcc, and alone by clang where that is
 * installed. Frames hold Ethernet + IPv4 without options at base + addr[i]. Next hops of 32 bits (rte_fib keeps 4-byte
 * entries), 0 is "no route".
 *
 * cdef
struct rte_fib *forward_fib(const uint32_t *prefix, const uint8_t *length, const uint32_t *next_hop, int n, int lookup);
struct next_hop { uint8_t dst[6], src[6]; uint16_t port; uint16_t pad; };
uint64_t forward_timed(uint8_t *base, const uint64_t *addr, int n, struct rte_fib *fib, const struct next_hop *hops,
                       uint16_t *out_port, uint64_t *out_addr, uint64_t *drops, int *sent);
 */
#include "peers.h"
#include <rte_byteorder.h>
#include <rte_fib.h>
#include <rte_prefetch.h>
#include <string.h>

enum { BURST = 64 };
enum drop { NOT_IPV4, TTL, CHECKSUM, NO_ROUTE, DROP_REASONS };

struct next_hop { uint8_t dst[6], src[6]; uint16_t port; uint16_t pad; };

struct rte_fib *forward_fib(const uint32_t *prefix, const uint8_t *length, const uint32_t *next_hop, int n, int lookup)
{
    struct rte_fib_conf conf = { .type = RTE_FIB_DIR24_8, .default_nh = 0, .max_routes = n + 1024 };
    conf.dir24_8.nh_sz = RTE_FIB_DIR24_8_4B;
    conf.dir24_8.num_tbl8 = 1 << 16;
    struct rte_fib *fib = rte_fib_create("forward", 0, &conf);
    for (int i = 0; fib && i < n; i++)
        rte_fib_add(fib, prefix[i], length[i], next_hop[i]);
    if (fib)
        rte_fib_select_lookup(fib, lookup);
    return fib;
}

static inline int checksum_ok(const uint8_t *ip)
{
    uint16_t w[10];
    uint32_t sum = 0;
    memcpy(w, ip, sizeof w);
    for (int i = 0; i < 10; i++)
        sum += w[i];
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return sum == 0xffff;
}

/* Forwards n frames; writes the out port and address of each forwarded one; returns how many were. */
int forward(uint8_t *base, const uint64_t *addr, int n, struct rte_fib *fib, const struct next_hop *hops,
            uint16_t *out_port, uint64_t *out_addr, uint64_t drops[DROP_REASONS])
{
    int sent = 0;
    for (int start = 0; start < n; start += BURST) {
        int m = n - start < BURST ? n - start : BURST, live = 0;
        uint32_t dst[BURST];
        uint64_t hop[BURST];
        uint8_t *frame[BURST];

        for (int i = 0; i < m; i++)
            rte_prefetch0(base + addr[start + i]);
        for (int i = 0; i < m; i++) {
            uint8_t *p = base + addr[start + i], *ip = p + 14;
            uint16_t type;
            memcpy(&type, p + 12, 2);
            if (type != RTE_BE16(0x0800) || ip[0] != 0x45) { drops[NOT_IPV4]++; continue; }
            if (ip[8] <= 1) { drops[TTL]++; continue; }
            if (!checksum_ok(ip)) { drops[CHECKSUM]++; continue; }
            uint32_t be;
            memcpy(&be, ip + 16, 4);
            dst[live] = rte_be_to_cpu_32(be);
            frame[live++] = p;
        }
        rte_fib_lookup_bulk(fib, dst, hop, live);
        for (int i = 0; i < live; i++) {
            uint8_t *p = frame[i], *ip = p + 14;
            if (!hop[i]) { drops[NO_ROUTE]++; continue; }
            const struct next_hop *h = &hops[hop[i]];
            memcpy(p, h, 12);
            uint16_t sum;
            memcpy(&sum, ip + 10, 2);
            uint32_t next = (uint32_t)sum + RTE_BE16(0x0100);
            sum = (uint16_t)(next + (next >> 16));
            memcpy(ip + 10, &sum, 2);
            ip[8]--;
            out_port[sent] = h->port;
            out_addr[sent++] = (uint64_t)(p - base);
        }
    }
    return sent;
}

/* The same, timed: ticks; how many were forwarded is left in `sent`. */
uint64_t forward_timed(uint8_t *base, const uint64_t *addr, int n, struct rte_fib *fib, const struct next_hop *hops,
                       uint16_t *out_port, uint64_t *out_addr, uint64_t *drops, int *sent)
{
    uint64_t start = rte_rdtsc();
    *sent = forward(base, addr, n, fib, hops, out_port, out_addr, drops);
    return rte_rdtsc() - start;
}
