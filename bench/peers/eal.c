/* cdef
int peers_start(int argc, char **argv);
const char *peers_error(void);
const char *peers_version(void);
void peers_stop(void);
*/
#include "peers.h"
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_version.h>

int peers_start(int argc, char **argv) { return rte_eal_init(argc, argv); }
const char *peers_error(void) { return rte_strerror(rte_errno); }
const char *peers_version(void) { return rte_version(); }
void peers_stop(void) { rte_eal_cleanup(); }
