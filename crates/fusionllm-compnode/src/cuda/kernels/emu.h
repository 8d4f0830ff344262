#pragma once
// dev.h's vocabulary on the CPU, for tests: each thread of a block is a fiber, blocks run one after the other.
// Fibers run until a barrier, a shuffle or a matrix instruction; EMU_SEED=n runs them in an order drawn from n, so that
// a missing barrier shows. Copies by cp16 happen at cp_wait and not before. Bad use ends the process with a message.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
#define DEV static inline
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__

struct dim3 {
    unsigned x, y, z;
};
namespace emu {
#ifdef __x86_64__
// Saves the registers a call must keep, changes the stack, and goes on where that stack was left.
extern "C" void emu_switch(void** save, void* load) __asm__("emu_switch_stack");
__asm__(
    ".text\nemu_switch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
struct Context {
    void* sp;
    void start(char* stack, size_t size, void (*entry)()) {
        void** top = (void**)(((uintptr_t)stack + size) & ~(uintptr_t)15);
        top[-1] = nullptr;
        top[-2] = (void*)entry;
        for (int i = 3; i <= 8; i++) top[-i] = nullptr;
        sp = top - 8;
    }
};
inline void change(Context& from, Context& to) { emu_switch(&from.sp, to.sp); }
#else
struct Context {
    ucontext_t c;
    void start(char* stack, size_t size, void (*entry)()) {
        getcontext(&c);
        c.uc_stack.ss_sp = stack;
        c.uc_stack.ss_size = size;
        c.uc_link = nullptr;
        makecontext(&c, entry, 0);
    }
};
inline void change(Context& from, Context& to) { swapcontext(&from.c, &to.c); }
#endif

struct Copy {
    char* to;
    const char* from;
    int group;
};
constexpr size_t STACK = 128 << 10;
struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    bool done;
    int next, previous;        // a ring of the threads still running, in the order they get their turns
    int group;                 // of copies: those committed so far
    std::vector<Copy> copies;  // not done yet
};
struct Barrier {
    int waiting, left;
    unsigned long turn;
};
struct State {
    std::vector<Fiber> fibers;
    Context back;
    int current, threads;
    dim3 block, grid, block_size;
    Barrier warps[32], all;
    u32 slots[1024][8];
    const void* addresses[1024];
    void (*run)(const void*);
    const void* body;
};
inline thread_local State* state = nullptr;

[[noreturn]] inline void die(const char* what) {
    fprintf(stderr, "kernel emulator: %s (block %u,%u thread %d)\n", what, state ? state->block.x : 0,
            state ? state->block.y : 0, state ? state->current : 0);
    abort();
}
inline void yield() {
    State& s = *state;
    int me = s.current, next = s.fibers[me].next;
    if (next == me) return;
    s.current = next;
    change(s.fibers[me].context, s.fibers[next].context);
}
inline void wait(Barrier& b, int size) {
    unsigned long turn = b.turn;
    if (++b.waiting == size) {
        b.waiting = 0;
        b.turn++;
        return;
    }
    while (b.turn == turn) {
        if (b.left) die("a thread ended before a barrier that others of its group wait at");
        yield();
    }
}
inline void wait_warp() {
    int w = state->current / 32;
    wait(state->warps[w], std::min(32, state->threads - 32 * w));
}
inline void finish_copies(int up_to) {
    auto& copies = state->fibers[state->current].copies;
    size_t kept = 0;
    for (auto& c : copies) {
        if (c.group > up_to) {
            copies[kept++] = c;
            continue;
        }
        if (c.from)
            memcpy(c.to, c.from, 16);
        else
            memset(c.to, 0, 16);
    }
    copies.resize(kept);
}
inline void enter() {
    State& s = *state;
    s.run(s.body);
    finish_copies(1 << 30);
    Fiber& f = s.fibers[s.current];
    f.done = true;
    s.warps[s.current / 32].left++;
    s.all.left++;
    s.fibers[f.previous].next = f.next;
    s.fibers[f.next].previous = f.previous;
    if (s.all.left == s.threads) change(f.context, s.back);
    s.current = f.next;
    change(f.context, s.fibers[s.current].context);
}
inline void start_block(State& s, u32* random) {
    int n = s.threads;
    int order[1024];
    for (int i = 0; i < n; i++) order[i] = i;
    if (*random)
        for (int i = n - 1; i > 0; i--) {
            *random = *random * 1664525u + 1013904223u;
            std::swap(order[i], order[(*random >> 8) % (u32)(i + 1)]);
        }
    for (auto& w : s.warps) w = Barrier{};
    s.all = Barrier{};
    for (int k = 0; k < n; k++) {
        Fiber& f = s.fibers[order[k]];
        f.index = {(unsigned)order[k], 0, 0};
        f.done = false;
        f.group = 0;
        f.next = order[(k + 1) % n];
        f.previous = order[(k + n - 1) % n];
        f.context.start(f.stack.get(), STACK, enter);
    }
    s.current = order[0];
    change(s.back, s.fibers[order[0]].context);
}
// The calling thread's emulator, kept from launch to launch.
inline State& prepare(unsigned threads) {
    static thread_local std::unique_ptr<State> owner(new State());
    state = owner.get();
    while (state->fibers.size() < threads) {
        state->fibers.emplace_back();
        state->fibers.back().stack.reset(new char[STACK]);
    }
    return *state;
}
template <class F> void launch(dim3 grid, unsigned threads, const F& body) {
    State& s = prepare(threads);
    s.threads = (int)threads;
    s.grid = grid;
    s.block_size = {threads, 1, 1};
    s.run = [](const void* f) { (*(const F*)f)(); };
    s.body = &body;
    const char* seed = getenv("EMU_SEED");
    u32 random = seed ? (u32)strtoul(seed, nullptr, 10) * 2654435761u : 0;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                s.block = {x, y, z};
                start_block(s, &random);
            }
}
template <class V> V exchange(V v, int lane) {
    static_assert(sizeof(V) <= 32);
    State& s = *state;
    int me = s.current;
    memcpy(s.slots[me], &v, sizeof v);
    wait_warp();
    V r;
    memcpy(&r, s.slots[(me & ~31) | (lane & 31)], sizeof r);
    wait_warp();
    return r;
}
}  // namespace emu
#define threadIdx (emu::state->fibers[emu::state->current].index)
#define blockIdx (emu::state->block)
#define gridDim (emu::state->grid)
#define blockDim (emu::state->block_size)
#define KERNEL(name, args_type, threads)                                                  \
    static void name(const args_type& a);                                                 \
    extern "C" void emu_##name(const void* args, unsigned gx, unsigned gy, unsigned gz) { \
        args_type a;                                                                      \
        memcpy(&a, args, sizeof a);                                                       \
        emu::launch(dim3{gx, gy, gz}, threads, [&] { name(a); });                         \
    }                                                                                     \
    static void name(const args_type& a)
#define KERNEL_RESIDENT(name, args_type, threads, blocks) KERNEL(name, args_type, threads)

DEV void __syncthreads() { emu::wait(emu::state->all, emu::state->threads); }
DEV void __syncwarp() { emu::wait_warp(); }
DEV void check16(const void* p) {
    if ((uintptr_t)p & 15) emu::die("an address is not a multiple of 16");
}
DEV u32 f32_bits(float v) {
    u32 x;
    memcpy(&x, &v, 4);
    return x;
}
DEV float bits_f32(u32 x) {
    float v;
    memcpy(&v, &x, 4);
    return v;
}
DEV u32 __float_as_uint(float v) { return f32_bits(v); }
DEV float __uint_as_float(u32 v) { return bits_f32(v); }
template <class V> DEV V shfl_xor(V v, int mask) { return emu::exchange(v, emu::state->current ^ mask); }
template <class V> DEV V shfl(V v, int lane) { return emu::exchange(v, lane); }
#define __expf expf  // the C library has hidden functions of these names
#define __logf logf
DEV float exp2_fast(float v) { return exp2f(v); }
DEV float __fdividef(float x, float y) { return x / y; }
DEV float rsqrtf(float v) { return 1.0f / sqrtf(v); }
template <class V> DEV V min(V x, V y) { return y < x ? y : x; }
template <class V> DEV V max(V x, V y) { return x < y ? y : x; }

DEV u16 to_bf16(float v) {
    u32 x = f32_bits(v);
    return v != v ? (u16)0x7fff : (u16)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
DEV u32 pack(float lo, float hi) { return to_bf16(lo) | ((u32)to_bf16(hi) << 16); }
DEV void cp16z(void* s, const void* g, bool valid) {
    check16(s);
    check16(g);
    auto& f = emu::state->fibers[emu::state->current];
    memset(s, 0xff, 16);  // bf16 and f32 NaN, until the wait
    f.copies.push_back({(char*)s, valid ? (const char*)g : nullptr, f.group});
}
DEV void cp16(void* s, const void* g) { cp16z(s, g, true); }
DEV void cp_commit() { emu::state->fibers[emu::state->current].group++; }
template <int N> DEV void cp_wait() { emu::finish_copies(emu::state->fibers[emu::state->current].group - 1 - N); }
template <bool TRANSPOSED> DEV void load_matrices(u32* r, const void* p) {
    check16(p);
    auto& s = *emu::state;
    int me = s.current, w = me & ~31, l = me & 31;
    s.addresses[me] = p;
    emu::wait_warp();
    for (int i = 0; i < 4; i++) {
        const void* const* rows = s.addresses + w + 8 * i;
        u16 e[2];
        for (int k = 0; k < 2; k++)
            e[k] = TRANSPOSED ? ((const u16*)rows[2 * (l % 4) + k])[l / 4] : ((const u16*)rows[l / 4])[2 * (l % 4) + k];
        r[i] = e[0] | ((u32)e[1] << 16);
    }
    emu::wait_warp();
}
DEV void ldm4(u32* r, const void* p) { load_matrices<false>(r, p); }
DEV void ldm4t(u32* r, const void* p) { load_matrices<true>(r, p); }
DEV void mma(float* c, const u32* a, const u32* b) {
    auto& s = *emu::state;
    int me = s.current, w = me & ~31, l = me & 31;
    memcpy(s.slots[me], a, 16);
    memcpy(s.slots[me] + 4, b, 8);
    emu::wait_warp();
    for (int o = 0; o < 4; o++) {
        int row = l / 4 + (o >> 1) * 8, n = 2 * (l % 4) + (o & 1);
        float sum = c[o];
        for (int k = 0; k < 16; k++) {
            u32 x = s.slots[w + (row % 8) * 4 + (k % 8) / 2][(row >= 8) + 2 * (k >= 8)],
                y = s.slots[w + n * 4 + (k % 8) / 2][4 + (k >= 8)];
            sum += bits_f32(k & 1 ? x & 0xffff0000u : x << 16) * bits_f32(k & 1 ? y & 0xffff0000u : y << 16);
        }
        c[o] = sum;
    }
    emu::wait_warp();
}
