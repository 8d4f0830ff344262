// Counts what a process copies by memcpy and memmove, calls and bytes, into a file `copies-PID` of the folder $COPIES.
// The file is shared memory, so that the counts outlive the process however it ends. For LD_PRELOAD; see copies.py.
//
// Not counted: what the compiler puts in place of a call (small copies of constant size), loops that copy while they
// convert or compute, and what the kernel copies.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// Copies of at least a page are of tensors and files; smaller ones are mostly of packets, keys and names.
#define LARGE 4096

struct counts {
    _Atomic uint64_t large_calls, large_bytes, small_calls, small_bytes;
};

typedef void *(*copy)(void *, const void *, size_t);

static struct counts until_mapped;
static struct counts *counts = &until_mapped;
static copy next_memcpy, next_memmove;

static void count(size_t bytes) {
    if (bytes >= LARGE) {
        atomic_fetch_add_explicit(&counts->large_calls, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&counts->large_bytes, bytes, memory_order_relaxed);
    } else {
        atomic_fetch_add_explicit(&counts->small_calls, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&counts->small_bytes, bytes, memory_order_relaxed);
    }
}

__attribute__((constructor)) static void begin(void) {
    next_memcpy = (copy)dlsym(RTLD_NEXT, "memcpy");
    next_memmove = (copy)dlsym(RTLD_NEXT, "memmove");
    const char *folder = getenv("COPIES");
    char path[4096];
    if (!folder || snprintf(path, sizeof path, "%s/copies-%d", folder, (int)getpid()) >= (int)sizeof path)
        return;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof *counts))
        return;
    void *shared = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared != MAP_FAILED)
        counts = shared;
}

// Before `begin`, byte by byte: finding the next one copies, too.
static void *bytewise(void *to, const void *from, size_t bytes) {
    volatile char *into = to;
    const char *of = from;
    if (into < of)
        for (size_t i = 0; i < bytes; i++) into[i] = of[i];
    else
        for (size_t i = bytes; i > 0; i--) into[i - 1] = of[i - 1];
    return to;
}

void *memcpy(void *to, const void *from, size_t bytes) {
    count(bytes);
    return (next_memcpy ? next_memcpy : bytewise)(to, from, bytes);
}

void *memmove(void *to, const void *from, size_t bytes) {
    count(bytes);
    return (next_memmove ? next_memmove : bytewise)(to, from, bytes);
}
