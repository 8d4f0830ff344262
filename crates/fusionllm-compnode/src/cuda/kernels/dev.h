#pragma once
// All that kernels may use beyond plain C++: this file for NVIDIA (the executor puts its text before each kernel file),
// emu.h for the CPU. What follows the #endif is common to both.
#ifdef EMU
#include "emu.h"
#else
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned u32;
typedef unsigned long long u64;
#define DEV __device__ __forceinline__
// A kernel takes one struct by value, named `a`: pointers first, then 4-byte fields; blocks have one dimension.
#define KERNEL(name, args_type, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ args_type a)
// The same, where so many blocks must fit on a multiprocessor at once: it sets how many registers a thread may use.
#define KERNEL_RESIDENT(name, args_type, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ args_type a)

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void check16(const void*) {}
DEV u32 f32_bits(float v) { return __float_as_uint(v); }
DEV float bits_f32(u32 v) { return __uint_as_float(v); }
DEV float shfl_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEV double shfl_xor(double v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEV u32 shfl_xor(u32 v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEV float shfl(float v, int lane) { return __shfl_sync(~0u, v, lane); }
// 2^v, to 2 units in the last place; results below 2^-126 are 0.
DEV float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(v));
    return r;
}
#if __CUDA_ARCH__ >= 800
// Two floats to bf16, rounded to nearest even; `lo` in the lower half.
DEV u32 pack(float lo, float hi) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
DEV u16 to_bf16(float v) { return (u16)pack(v, 0.f); }
// 16 bytes from global to shared memory, done only after cp_wait. cp16z writes zeros (and reads nothing) unless
// `valid`.
DEV void cp16(void* s, const void* g) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;\n" ::"r"(shared_address(s)), "l"(g) : "memory");
}
DEV void cp16z(void* s, const void* g, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;\n" ::"r"(shared_address(s)), "l"(g), "r"(valid ? 16 : 0)
                 : "memory");
}
DEV void cp_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N> DEV void cp_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }
// Four 8x8 matrices of bf16 from shared memory; lane l gives the address of row l%8 of matrix l/8. ldm4t transposes
// each.
DEV void ldm4(u32* r, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
DEV void ldm4t(u32* r, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
// c (16x8, f32) += a (16x16, bf16, row major) * b (16x8, bf16, column major).
DEV void mma(float* c, const u32* a, const u32* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
// Before sm_80 there is no instruction for it; NaN stays NaN.
DEV u16 to_bf16(float v) {
    u32 x = __float_as_uint(v);
    return v != v ? (u16)0x7fff : (u16)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
DEV u32 pack(float lo, float hi) { return to_bf16(lo) | ((u32)to_bf16(hi) << 16); }
#endif
#endif

DEV float from_bf16(u16 v) { return bits_f32((u32)v << 16); }
// The halves of a pair of bf16.
DEV float lo_bf16(u32 v) { return bits_f32(v << 16); }
DEV float hi_bf16(u32 v) { return bits_f32(v & 0xffff0000u); }

// One element of a tensor of type T (float, or u16 for bf16), computed with as f32.
DEV float get(float v) { return v; }
DEV float get(u16 v) { return from_bf16(v); }
DEV void put(float* p, float v) { *p = v; }
DEV void put(u16* p, float v) { *p = to_bf16(v); }
// `v` rounded as storing it in T does.
template <class T> DEV float round_to(float v) {
    T stored;
    put(&stored, v);
    return get(stored);
}

// 16 bytes of a tensor: 4 floats or 8 bf16 values. The address must be a multiple of 16.
struct alignas(16) Words4 {
    u32 w[4];
};
struct alignas(8) Words2 {
    u32 w[2];
};
#ifdef EMU
DEV Words4 fixed16(const void* p) {
    check16(p);
    return *(const Words4*)p;
}
DEV float fixed(const float* p) { return *p; }
#else
// From memory that the kernel does not write: these loads may be moved before stores.
DEV Words4 fixed16(const void* p) {
    uint4 v = __ldg((const uint4*)p);
    return Words4{{v.x, v.y, v.z, v.w}};
}
DEV float fixed(const float* p) { return __ldg(p); }
#endif
template <class T> struct Per16 {
    static constexpr int n = 16 / sizeof(T);
};
DEV void unpack16(float* v, const Words4& r, const float*) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = bits_f32(r.w[i]);
}
DEV void unpack16(float* v, const Words4& r, const u16*) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = lo_bf16(r.w[i]);
        v[2 * i + 1] = hi_bf16(r.w[i]);
    }
}
DEV Words4 pack16(const float* v, const float*) {
    Words4 r;
#pragma unroll
    for (int i = 0; i < 4; i++) r.w[i] = f32_bits(v[i]);
    return r;
}
DEV Words4 pack16(const float* v, const u16*) {
    Words4 r;
#pragma unroll
    for (int i = 0; i < 4; i++) r.w[i] = pack(v[2 * i], v[2 * i + 1]);
    return r;
}
template <class T> DEV Words4 raw16(const T* p) {
    check16(p);
    return *(const Words4*)p;
}
template <class T> DEV void load16(float* v, const T* p) { unpack16(v, raw16(p), p); }
template <class T> DEV void store16(T* p, const float* v) {
    check16(p);
    *(Words4*)p = pack16(v, p);
}
// N elements: one, four, or a multiple of 16 bytes. The address must be a multiple of the bytes of one access.
template <int N> DEV void load(float* v, const float* p) {
    if constexpr (N == 1)
        v[0] = *p;
    else
#pragma unroll
        for (int i = 0; i < N; i += 4) load16(v + i, p + i);
}
template <int N> DEV void load(float* v, const u16* p) {
    if constexpr (N == 1)
        v[0] = get(*p);
    else if constexpr (N == 4) {
        Words2 r = *(const Words2*)p;
        v[0] = lo_bf16(r.w[0]);
        v[1] = hi_bf16(r.w[0]);
        v[2] = lo_bf16(r.w[1]);
        v[3] = hi_bf16(r.w[1]);
    } else
#pragma unroll
        for (int i = 0; i < N; i += 8) load16(v + i, p + i);
}
template <int N> DEV void store(float* p, const float* v) {
    if constexpr (N == 1)
        *p = v[0];
    else
#pragma unroll
        for (int i = 0; i < N; i += 4) store16(p + i, v + i);
}
template <int N> DEV void store(u16* p, const float* v) {
    if constexpr (N == 1)
        put(p, v[0]);
    else if constexpr (N == 4)
        *(Words2*)p = Words2{{pack(v[0], v[1]), pack(v[2], v[3])}};
    else
#pragma unroll
        for (int i = 0; i < N; i += 8) store16(p + i, v + i);
}
template <int N> DEV void load_fixed(float* v, const float* p) {
    if constexpr (N == 1)
        v[0] = fixed(p);
    else
#pragma unroll
        for (int i = 0; i < N; i += 4) unpack16(v + i, fixed16(p + i), p);
}
// f<N>(...) with N = 16 bytes of T where rows of `columns` elements begin at multiples of 16 bytes, else with N = 1.
#define BY_WIDTH(f, T, columns, ...) ((columns) % Per16<T>::n == 0 ? f<Per16<T>::n>(__VA_ARGS__) : f<1>(__VA_ARGS__))

// e^v: to the last bits for f32, by the fast instruction (1e-6) where the result goes to bf16.
template <class T> DEV float exp_for(float v) {
    if constexpr (sizeof(T) == 2)
        return __expf(v);
    else
        return expf(v);
}

#define LOWEST (-3.402823466e38f)  // of the finite floats

// Sum and maximum over a warp, the same in every lane.
template <class F> DEV F warp_sum(F v) {
#pragma unroll
    for (int m = 16; m; m >>= 1) v += shfl_xor(v, m);
    return v;
}
DEV float warp_max(float v) {
#pragma unroll
    for (int m = 16; m; m >>= 1) v = fmaxf(v, shfl_xor(v, m));
    return v;
}

#if defined(EMU) || __CUDA_ARCH__ >= 800
// Tiles of bf16 in shared memory for mma: rows of D values (32, 64 or 128), each row's 16-byte chunks in an order that
// depends on the row, so that eight rows of one chunk column lie in different banks. A tile must start at a multiple of
// 16 rows' bytes or 128.
template <int D> DEV int tile_index(int row, int chunk) {
    return row * D + ((chunk ^ (D >= 64 ? row & 7 : (row >> 1) & 3)) << 3);
}
// Starts copying ROWS rows of a tensor, from row `first`; rows from `end` on become zeros. `stride` is in values.
template <int D, int ROWS, int THREADS> DEV void copy_tile(u16* tile, const u16* g, u32 stride, int first, int end) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread's rows are alike in the order of their chunks");
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, left = end - first - row;
    u16* to = tile + tile_index<D>(row, chunk);
    const u16* from = g + (u64)(u32)(first + row) * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        cp16z(to + i * D, from, i < left);
        from += (u64)stride * STEP;
    }
}
// Fragments of mma from 16 rows of a tile, columns 16k..16k+16; `at` is the lane's place, the same for all of a kernel:
// lane_b's for load_b, lane_a's for the others.
//   load_a: the rows are the rows of a.   load_b: the rows are the columns of two b (b[0..2], b[2..4]).
//   load_b_rows: the rows are the rows of two b, columns 16k..16k+8 and 16k+8..16k+16.
template <int D> DEV int lane_a(int lane) { return tile_index<D>(lane & 15, lane >> 4); }
template <int D> DEV int lane_b(int lane) { return tile_index<D>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1); }
DEV void load_a(u32* a, const u16* rows, int at, int k) { ldm4(a, rows + (at ^ (k * 16))); }
DEV void load_b(u32* b, const u16* rows, int at, int k) { ldm4(b, rows + (at ^ (k * 16))); }
DEV void load_b_rows(u32* b, const u16* rows, int at, int k) { ldm4t(b, rows + (at ^ (k * 16))); }
// An accumulator c of mma holds rows mma_row(lane, i) and columns mma_column(lane, i) in c[i].
DEV int mma_row(int lane, int i) { return lane / 4 + (i >> 1) * 8; }
DEV int mma_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }
// Two accumulators side by side (16x16), rounded to bf16, as the next product's a.
DEV void accumulators_to_a(u32* a, const float* left, const float* right) {
    a[0] = pack(left[0], left[1]);
    a[1] = pack(left[2], left[3]);
    a[2] = pack(right[0], right[1]);
    a[3] = pack(right[2], right[3]);
}
// Writes 16 rows of D accumulated values times a factor for each half of them, rounded to bf16, by way of 16 rows of a
// tile that only this warp uses; the rows from `end` on are not written.
template <int D>
DEV void store_rows(const float (*acc)[4], float factor0, float factor1, u16* rows, u16* g, u32 stride, int first,
                    int end) {
    constexpr int CHUNKS = D / 8;
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
        *(u32*)(rows + tile_index<D>(lane / 4, n) + lane % 4 * 2) = pack(acc[n][0] * factor0, acc[n][1] * factor0);
        *(u32*)(rows + tile_index<D>(lane / 4 + 8, n) + lane % 4 * 2) = pack(acc[n][2] * factor1, acc[n][3] * factor1);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        if (first + row < end)
            *(Words4*)(g + (u64)(u32)(first + row) * stride + chunk * 8) =
                *(const Words4*)(rows + tile_index<D>(row, chunk));
    }
}
#endif
// Sum over a block, the same in every thread, added in the same order always. `shared` has one place a warp and must
// not be in use: a barrier lies between two uses of it.
template <int THREADS, class F> DEV F block_sum(F v, F* shared) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    F sum = shared[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) sum += shared[i];
    return sum;
}
