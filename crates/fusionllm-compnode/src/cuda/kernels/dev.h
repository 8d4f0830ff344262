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
#if __CUDA_ARCH__ >= 800
// Two floats to bf16, rounded to nearest even; `lo` in the lower half.
DEV u32 pack(float lo, float hi) { u32 d; asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
DEV u16 to_bf16(float v) { return (u16)pack(v, 0.f); }
// 16 bytes from global to shared memory, done only after cp_wait. cp16z writes zeros (and reads nothing) unless `valid`.
DEV void cp16(void* s, const void* g) { asm volatile("cp.async.cg.shared.global [%0],[%1],16;\n" ::"r"(shared_address(s)), "l"(g) : "memory"); }
DEV void cp16z(void* s, const void* g, bool valid) { asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;\n" ::"r"(shared_address(s)), "l"(g), "r"(valid ? 16 : 0) : "memory"); }
DEV void cp_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N> DEV void cp_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }
// Four 8x8 matrices of bf16 from shared memory; lane l gives the address of row l%8 of matrix l/8. ldm4t transposes each.
DEV void ldm4(u32* r, const void* p) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory"); }
DEV void ldm4t(u32* r, const void* p) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory"); }
// c (16x8, f32) += a (16x16, bf16, row major) * b (16x8, bf16, column major).
DEV void mma(float* c, const u32* a, const u32* b) { asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); }
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
struct alignas(16) Words4 { u32 w[4]; };
struct alignas(8) Words2 { u32 w[2]; };
template <class T> struct Per16 { static constexpr int n = 16 / sizeof(T); };
DEV void unpack16(float* v, const Words4& r, const float*) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = bits_f32(r.w[i]);
}
DEV void unpack16(float* v, const Words4& r, const u16*) {
#pragma unroll
    for (int i = 0; i < 4; i++) { v[2 * i] = lo_bf16(r.w[i]); v[2 * i + 1] = hi_bf16(r.w[i]); }
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
template <class T> DEV Words4 raw16(const T* p) { check16(p); return *(const Words4*)p; }
template <class T> DEV void load16(float* v, const T* p) { unpack16(v, raw16(p), p); }
template <class T> DEV void store16(T* p, const float* v) { check16(p); *(Words4*)p = pack16(v, p); }
// Four elements: 16 bytes of f32, 8 of bf16.
DEV void load4(float* v, const float* p) { load16(v, p); }
DEV void load4(float* v, const u16* p) {
    Words2 r = *(const Words2*)p;
    v[0] = lo_bf16(r.w[0]); v[1] = hi_bf16(r.w[0]); v[2] = lo_bf16(r.w[1]); v[3] = hi_bf16(r.w[1]);
}
DEV void store4(float* p, const float* v) { store16(p, v); }
DEV void store4(u16* p, const float* v) { *(Words2*)p = Words2{{pack(v[0], v[1]), pack(v[2], v[3])}}; }

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
