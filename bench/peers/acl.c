/* rte_acl: headers of 16 bytes as on the wire (source, destination, sport, dport, protocol, and three bytes that the
 * rules here do not ask about), classified in one category, results of 4 bytes: the number of the first rule that
 * matches, from 1 on, or 0. Rules are rows of ten u32: source, its length, destination, its length, sport from and to,
 * dport from and to, protocol, its mask; the first counts most. `acl_classify` goes `passes` times over `count` headers
 * in bursts of `burst`, by one of rte_acl's algorithms, and returns its ticks; results are kept if there is room for
 * them, and otherwise each burst overwrites the last.
 *
 * cdef
struct rte_acl_ctx *acl_make(const uint32_t *rules, unsigned count, uint64_t *ticks);
void acl_free(struct rte_acl_ctx *acl);
int acl_select(struct rte_acl_ctx *acl, unsigned algorithm);
uint64_t acl_classify(struct rte_acl_ctx *acl, unsigned burst, const uint8_t *headers, unsigned count, unsigned passes,
                      uint32_t *results);
*/
#include "peers.h"
#include <rte_acl.h>
#include <rte_errno.h>
#include <rte_vect.h>
#include <stdlib.h>
#include <string.h>

#define FIELDS 5
#define HEADER 16
#define MOST 1024

RTE_ACL_RULE_DEF(rule, FIELDS);

struct rte_acl_ctx *acl_make(const uint32_t *rules, unsigned count, uint64_t *ticks)
{
    static const struct rte_acl_field_def fields[FIELDS] = {
        {.type = RTE_ACL_FIELD_TYPE_BITMASK, .size = 1, .field_index = 0, .input_index = 0, .offset = 12},
        {.type = RTE_ACL_FIELD_TYPE_MASK, .size = 4, .field_index = 1, .input_index = 1, .offset = 0},
        {.type = RTE_ACL_FIELD_TYPE_MASK, .size = 4, .field_index = 2, .input_index = 2, .offset = 4},
        {.type = RTE_ACL_FIELD_TYPE_RANGE, .size = 2, .field_index = 3, .input_index = 3, .offset = 8},
        {.type = RTE_ACL_FIELD_TYPE_RANGE, .size = 2, .field_index = 4, .input_index = 3, .offset = 10},
    };
    struct rte_acl_param wanted = {
        .name = "bench", .socket_id = SOCKET_ID_ANY, .rule_size = RTE_ACL_RULE_SZ(FIELDS), .max_rule_num = count};
    struct rte_acl_config config = {.num_categories = 1, .num_fields = FIELDS};
    struct rte_acl_ctx *acl;
    uint64_t start;

    rte_vect_set_max_simd_bitwidth(RTE_VECT_SIMD_512);
    acl = rte_acl_create(&wanted);
    memcpy(config.defs, fields, sizeof(fields));
    start = rte_rdtsc();
    for (unsigned i = 0; acl && i < count; i++) {
        const uint32_t *row = rules + 10 * i;
        struct rule one = {
            .data = {.category_mask = 1, .priority = RTE_ACL_MAX_PRIORITY - i, .userdata = i + 1},
            .field = {{.value.u8 = row[8], .mask_range.u8 = row[9]},
                      {.value.u32 = row[0], .mask_range.u32 = row[1]},
                      {.value.u32 = row[2], .mask_range.u32 = row[3]},
                      {.value.u16 = row[4], .mask_range.u16 = row[5]},
                      {.value.u16 = row[6], .mask_range.u16 = row[7]}},
        };
        if (rte_acl_add_rules(acl, (struct rte_acl_rule *)&one, 1)) {
            rte_acl_free(acl);
            return NULL;
        }
    }
    if (acl && rte_acl_build(acl, &config)) {
        rte_acl_free(acl);
        return NULL;
    }
    *ticks = rte_rdtsc() - start;
    return acl;
}

void acl_free(struct rte_acl_ctx *acl) { rte_acl_free(acl); }

int acl_select(struct rte_acl_ctx *acl, unsigned algorithm) { return rte_acl_set_ctx_classify(acl, algorithm); }

uint64_t acl_classify(struct rte_acl_ctx *acl, unsigned burst, const uint8_t *headers, unsigned count, unsigned passes,
                      uint32_t *results)
{
    const uint8_t *at[MOST];
    uint32_t found[MOST];
    uint64_t start = rte_rdtsc();
    for (unsigned pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < count; i += burst) {
            for (unsigned j = 0; j < burst; j++)
                at[j] = headers + HEADER * (i + j);
            rte_acl_classify(acl, at, results ? results + i : found, burst, 1);
            __asm__ volatile("" : : "r"(found) : "memory");
        }
    return rte_rdtsc() - start;
}
