/* rte_lpm, rte_fib (dir24_8) and rte_fib6 (trie), next hops of 4 bytes. Routes are rows of (address, length, value),
 * addresses of IPv4 in host order. A lookup function goes `passes` times over `count` keys in bursts of 64 and returns
 * its ticks; results (u32) are kept if there is room for them, and otherwise each burst overwrites the last.
 *
 * cdef
struct rte_lpm *lpm_make(const uint32_t *routes, unsigned count);
void lpm_free(struct rte_lpm *lpm);
uint64_t lpm_bulk(struct rte_lpm *lpm, const uint32_t *keys, unsigned count, unsigned passes, uint32_t *results);
uint64_t lpm_x4(struct rte_lpm *lpm, const uint32_t *keys, unsigned count, unsigned passes, uint32_t *results);
struct rte_fib *fib_make(const uint32_t *routes, unsigned count, uint64_t *ticks);
void fib_free(struct rte_fib *fib);
int fib_select(struct rte_fib *fib, unsigned type);
uint64_t fib_lookup(struct rte_fib *fib, const uint32_t *keys, unsigned count, unsigned passes, uint32_t *results);
struct rte_fib6 *fib6_make(const uint8_t *routes, unsigned count);
void fib6_free(struct rte_fib6 *fib);
int fib6_select(struct rte_fib6 *fib, unsigned type);
uint64_t fib6_lookup(struct rte_fib6 *fib, const uint8_t *keys, unsigned count, unsigned passes, uint32_t *results);
*/
#include "peers.h"
#include <rte_fib.h>
#include <rte_fib6.h>
#include <rte_lpm.h>
#include <rte_prefetch.h>
#include <rte_vect.h>
#include <string.h>

#define BURST 64

/* For keys to come, as ours does: so many lines. */
static inline void ask(const void *keys, unsigned lines)
{
    for (unsigned line = 0; line < lines; line++)
        rte_prefetch0((const uint8_t *)keys + 64 * line);
}

/* The tables of rte_lpm are filled here, the shorter prefixes first, as rte_lpm_add would have it in the end: that
 * takes 200 us a route, for it looks for a route among all of its length. The layout is part of rte_lpm.h. */
struct rte_lpm *lpm_make(const uint32_t *routes, unsigned count)
{
    struct rte_lpm_config config = {.max_rules = 1, .number_tbl8s = 1 << 14};
    struct rte_lpm *lpm = rte_lpm_create("bench", SOCKET_ID_ANY, &config);
    unsigned groups = 0;

    for (unsigned length = 1; lpm && length <= 32; length++)
        for (unsigned i = 0; i < count; i++) {
            uint32_t address = routes[3 * i], value = routes[3 * i + 2];
            struct rte_lpm_tbl_entry entry = {.next_hop = value, .valid = 1, .depth = length};
            if (routes[3 * i + 1] != length)
                continue;
            if (length <= 24) {
                for (uint32_t j = 0; j < 1u << (24 - length); j++)
                    lpm->tbl24[(address >> 8) + j] = entry;
                continue;
            }
            struct rte_lpm_tbl_entry *slot = &lpm->tbl24[address >> 8];
            if (!slot->valid_group) {
                struct rte_lpm_tbl_entry group = {.next_hop = groups, .valid = 1, .valid_group = 1};
                if (groups == config.number_tbl8s) {
                    rte_lpm_free(lpm);
                    return NULL;
                }
                for (unsigned j = 0; j < 256; j++) {
                    struct rte_lpm_tbl_entry *leaf = &lpm->tbl8[256 * groups + j];
                    *leaf = *slot;
                    leaf->valid_group = 1;
                }
                *slot = group;
                groups++;
            }
            entry.valid_group = 1;
            for (uint32_t j = 0; j < 1u << (32 - length); j++)
                lpm->tbl8[256 * slot->next_hop + (address & 255) + j] = entry;
        }
    return lpm;
}

void lpm_free(struct rte_lpm *lpm) { rte_lpm_free(lpm); }

/* One burst's results: 0 is no route. */
static inline void keep(uint32_t *results, const uint32_t *next)
{
    for (unsigned j = 0; j < BURST; j++)
        results[j] = next[j] & RTE_LPM_LOOKUP_SUCCESS ? next[j] & 0xffffff : 0;
}

uint64_t lpm_bulk(struct rte_lpm *lpm, const uint32_t *keys, unsigned count, unsigned passes, uint32_t *results)
{
    uint32_t next[BURST];
    uint64_t start = rte_rdtsc();
    for (unsigned pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < count; i += BURST) {
            ask(keys + i + 2 * BURST, 4);
            rte_lpm_lookup_bulk(lpm, keys + i, next, BURST);
            __asm__ volatile("" : : "r"(next) : "memory");
            if (results)
                keep(results + i, next);
        }
    return rte_rdtsc() - start;
}

uint64_t lpm_x4(struct rte_lpm *lpm, const uint32_t *keys, unsigned count, unsigned passes, uint32_t *results)
{
    uint32_t next[BURST];
    uint64_t start = rte_rdtsc();
    for (unsigned pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < count; i += BURST) {
            ask(keys + i + 2 * BURST, 4);
            for (unsigned j = 0; j < BURST; j += 4)
                rte_lpm_lookupx4(lpm, _mm_loadu_si128((const void *)(keys + i + j)), next + j, 0);
            __asm__ volatile("" : : "r"(next) : "memory");
            for (unsigned j = 0; results && j < BURST; j++)
                results[i + j] = next[j];
        }
    return rte_rdtsc() - start;
}

struct rte_fib *fib_make(const uint32_t *routes, unsigned count, uint64_t *ticks)
{
    struct rte_fib_conf config = {.type = RTE_FIB_DIR24_8, .max_routes = 1 << 21,
                                  .dir24_8 = {.nh_sz = RTE_FIB_DIR24_8_4B, .num_tbl8 = 1 << 14}};
    uint64_t start = rte_rdtsc();
    struct rte_fib *fib = rte_fib_create("bench", SOCKET_ID_ANY, &config);
    for (unsigned i = 0; fib && i < count; i++)
        if (rte_fib_add(fib, routes[3 * i], routes[3 * i + 1], routes[3 * i + 2])) {
            rte_fib_free(fib);
            return NULL;
        }
    *ticks = rte_rdtsc() - start;
    return fib;
}

void fib_free(struct rte_fib *fib) { rte_fib_free(fib); }

int fib_select(struct rte_fib *fib, unsigned type)
{
    rte_vect_set_max_simd_bitwidth(RTE_VECT_SIMD_512);
    return rte_fib_select_lookup(fib, type);
}

uint64_t fib_lookup(struct rte_fib *fib, const uint32_t *keys, unsigned count, unsigned passes, uint32_t *results)
{
    uint64_t next[BURST];
    uint64_t start = rte_rdtsc();
    for (unsigned pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < count; i += BURST) {
            ask(keys + i + 2 * BURST, 4);
            rte_fib_lookup_bulk(fib, (uint32_t *)(uintptr_t)(keys + i), next, BURST);
            for (unsigned j = 0; results && j < BURST; j++)
                results[i + j] = next[j];
        }
    return rte_rdtsc() - start;
}

/* A row is 24 bytes: the address as on the wire, length and value in the machine's order. */
struct rte_fib6 *fib6_make(const uint8_t *routes, unsigned count)
{
    struct rte_fib6_conf config = {.type = RTE_FIB6_TRIE, .max_routes = 1 << 20,
                                   .trie = {.nh_sz = RTE_FIB6_TRIE_4B, .num_tbl8 = 1 << 19}};
    struct rte_fib6 *fib = rte_fib6_create("bench", SOCKET_ID_ANY, &config);
    for (unsigned i = 0; fib && i < count; i++) {
        uint32_t tail[2];
        memcpy(tail, routes + 24 * i + 16, sizeof tail);
        if (rte_fib6_add(fib, routes + 24 * i, tail[0], tail[1])) {
            rte_fib6_free(fib);
            return NULL;
        }
    }
    return fib;
}

void fib6_free(struct rte_fib6 *fib) { rte_fib6_free(fib); }

int fib6_select(struct rte_fib6 *fib, unsigned type)
{
    rte_vect_set_max_simd_bitwidth(RTE_VECT_SIMD_512);
    return rte_fib6_select_lookup(fib, type);
}

uint64_t fib6_lookup(struct rte_fib6 *fib, const uint8_t *keys, unsigned count, unsigned passes, uint32_t *results)
{
    uint64_t next[BURST];
    uint64_t start = rte_rdtsc();
    for (unsigned pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < count; i += BURST) {
            ask(keys + 16 * (i + BURST), 16);
            rte_fib6_lookup_bulk(fib, (uint8_t(*)[RTE_FIB6_IPV6_ADDR_SIZE])(uintptr_t)(keys + 16 * i), next, BURST);
            for (unsigned j = 0; results && j < BURST; j++)
                results[i + j] = next[j];
        }
    return rte_rdtsc() - start;
}
