/* The C side of `bench esp`: AES-GCM of ESP packets in place by libcrypto, with the calls that take the least time of
 * those that OpenSSL 3.0 has: a context is set up once, each packet gives it a nonce. Without OpenSSL's headers: its
 * library is the one that the process has. Packet i is at base + at[i]: SPI, sequence number, IV, data, ICV.
 *
 * cdef
void *esp_open(const uint8_t *key, int size, const uint8_t *salt, int decrypting);
uint64_t esp_timed(void *sa, uint8_t *base, const uint64_t *at, int n, int size, int *good);
void esp_close(void *sa);
 */
#include "peers.h"
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

struct param { const char *key; unsigned type; void *data; size_t size, returned; };
struct sa { void *context; int decrypting; uint8_t nonce[12]; struct param params[2]; };

static void *(*context_new)(void), *(*fetch)(void *, const char *, const char *);
static void (*context_free)(void *);
static int (*encrypt_init)(void *, void *, const uint8_t *, const uint8_t *, const struct param *);
static int (*decrypt_init)(void *, void *, const uint8_t *, const uint8_t *, const struct param *);
static int (*encrypt_update)(void *, uint8_t *, int *, const uint8_t *, int);
static int (*decrypt_update)(void *, uint8_t *, int *, const uint8_t *, int);
static int (*encrypt_final)(void *, uint8_t *, int *), (*decrypt_final)(void *, uint8_t *, int *);
static int (*get_params)(void *, struct param *);

void *esp_open(const uint8_t *key, int size, const uint8_t *salt, int decrypting)
{
    void *lib = dlopen("libcrypto.so.3", RTLD_NOW);
    if (!lib)
        return NULL;
    context_new = dlsym(lib, "EVP_CIPHER_CTX_new");
    context_free = dlsym(lib, "EVP_CIPHER_CTX_free");
    fetch = dlsym(lib, "EVP_CIPHER_fetch");
    encrypt_init = dlsym(lib, "EVP_EncryptInit_ex2");
    decrypt_init = dlsym(lib, "EVP_DecryptInit_ex2");
    encrypt_update = dlsym(lib, "EVP_EncryptUpdate");
    decrypt_update = dlsym(lib, "EVP_DecryptUpdate");
    encrypt_final = dlsym(lib, "EVP_EncryptFinal_ex");
    decrypt_final = dlsym(lib, "EVP_DecryptFinal_ex");
    get_params = dlsym(lib, "EVP_CIPHER_CTX_get_params");
    struct sa *sa = calloc(1, sizeof *sa);
    sa->context = context_new();
    sa->decrypting = decrypting;
    memcpy(sa->nonce, salt, 4);
    sa->params[0] = (struct param){ "tag", 5, NULL, 16, 0 };
    void *cipher = fetch(NULL, size == 16 ? "AES-128-GCM" : "AES-256-GCM", NULL);
    (decrypting ? decrypt_init : encrypt_init)(sa->context, cipher, key, NULL, NULL);
    return sa;
}

void esp_close(void *sa)
{
    context_free(((struct sa *)sa)->context);
    free(sa);
}

static inline int seal(struct sa *sa, uint8_t *esp, int size)
{
    uint8_t aad[12] = { 0 };
    int length;
    memcpy(aad, esp, 4);
    memcpy(aad + 8, esp + 4, 4);
    memcpy(sa->nonce + 4, esp + 8, 8);
    sa->params[0].data = esp + 16 + size;
    return encrypt_init(sa->context, NULL, NULL, sa->nonce, NULL) == 1
        && encrypt_update(sa->context, NULL, &length, aad, 12) == 1
        && encrypt_update(sa->context, esp + 16, &length, esp + 16, size) == 1
        && encrypt_final(sa->context, esp + 16 + size, &length) == 1
        && get_params(sa->context, sa->params) == 1;
}

static inline int unseal(struct sa *sa, uint8_t *esp, int size)
{
    uint8_t aad[12] = { 0 };
    int length;
    memcpy(aad, esp, 4);
    memcpy(aad + 8, esp + 4, 4);
    memcpy(sa->nonce + 4, esp + 8, 8);
    sa->params[0].data = esp + 16 + size;
    return decrypt_init(sa->context, NULL, NULL, sa->nonce, sa->params) == 1
        && decrypt_update(sa->context, NULL, &length, aad, 12) == 1
        && decrypt_update(sa->context, esp + 16, &length, esp + 16, size) == 1
        && decrypt_final(sa->context, esp + 16 + size, &length) == 1;
}

/* Ticks for n packets; how many libcrypto has taken is left in `good`. */
uint64_t esp_timed(void *given, uint8_t *base, const uint64_t *at, int n, int size, int *good)
{
    struct sa *sa = given;
    uint64_t start = rte_rdtsc();
    *good = 0;
    for (int i = 0; i < n; i++)
        *good += sa->decrypting ? unseal(sa, base + at[i], size) : seal(sa, base + at[i], size);
    return rte_rdtsc() - start;
}
