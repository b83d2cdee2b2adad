/* What every peer shares. A file of bench/peers declares its functions twice: in C, and for Python in one comment that
 * begins with "cdef"; all files are compiled into one library. Loops are timed here, by the counter libfp.jit.clock reads. */
#pragma once
#include <rte_cycles.h>
#include <rte_pause.h>
#include <stdint.h>

/* Wait for the other thread of a round: both come in, with the same `words`, and both leave at once. */
static inline void meet(volatile uint64_t *words, int side)
{
    __atomic_store_n(&words[16 * side], 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&words[16 * !side], __ATOMIC_ACQUIRE))
        rte_pause();
}
