#include "norm.h"

using rms_norm_f32_args = norm_args<float>;
using rms_norm_bf16_args = norm_args<u16>;
KERNEL_RESIDENT(rms_norm_f32, rms_norm_f32_args, 256, 2) { norm<false>(a); }
KERNEL_RESIDENT(rms_norm_bf16, rms_norm_bf16_args, 256, 2) { norm<false>(a); }
using rms_norm_grad_f32_args = norm_grad_args<float>;
using rms_norm_grad_bf16_args = norm_grad_args<u16>;
KERNEL_RESIDENT(rms_norm_grad_f32, rms_norm_grad_f32_args, 256, 2) { norm_grad<false>(a); }
KERNEL_RESIDENT(rms_norm_grad_bf16, rms_norm_grad_bf16_args, 256, 2) { norm_grad<false>(a); }

// The same for narrow rows, heads for example: of up to 512 bytes, a multiple of 16. The least power of two of lanes
// that has a row, 16 bytes a lane, takes it. grid = ceil(rows / (256 / lanes)) for FP, and as above for BP.
template <class T> DEV u32 lanes_of_row(u32 dim) {
    u32 lanes = 1;
    while (lanes * Per16<T>::n < dim) lanes *= 2;
    return lanes;
}
DEV float sum_over(float v, u32 lanes) {
    for (u32 m = lanes / 2; m; m /= 2) v += shfl_xor(v, (int)m);
    return v;
}
template <class T> DEV void rms_norm_narrow(const norm_args<T>& a) {
    constexpr int N = Per16<T>::n;
    const u32 lanes = lanes_of_row<T>(a.dim), r = blockIdx.x * (256 / lanes) + threadIdx.x / lanes;
    const u32 c = threadIdx.x % lanes * N;
    const bool mine = r < a.rows && c < a.dim;
    const size_t at = (size_t)r * a.dim;
    float v[N] = {}, squares = 0.f;
    if (mine) {
        load_row<N>(v, Row<T>{a.x + at, a.residual ? a.residual + at : nullptr}, c);
        if (a.residual && a.sum) store<N>(a.sum + at + c, v);
    }
#pragma unroll
    for (int i = 0; i < N; i++) squares += v[i] * v[i];
    const float rstd = rsqrtf(sum_over(squares, lanes) / (float)a.dim + a.eps);
    if (!mine) return;
    normalize<false, N>(a.out + at, v, a.weight, nullptr, c, 0.f, rstd);
    if (c == 0 && a.rstd) a.rstd[r] = rstd;
}
using rms_norm_narrow_f32_args = norm_args<float>;
using rms_norm_narrow_bf16_args = norm_args<u16>;
KERNEL(rms_norm_narrow_f32, rms_norm_narrow_f32_args, 256) { rms_norm_narrow(a); }
KERNEL(rms_norm_narrow_bf16, rms_norm_narrow_bf16_args, 256) { rms_norm_narrow(a); }

// The lanes of a row take ROWS rows at a time. Each thread has the same columns of all its rows, and keeps their sums
// for the weight in registers.
template <class T> DEV void rms_norm_narrow_grad(const norm_grad_args<T>& a) {
    constexpr int N = Per16<T>::n, ROWS = 4;
    __shared__ __align__(16) float columns[8][32 * N];
    const u32 lanes = lanes_of_row<T>(a.dim), teams = 256 / lanes, team = threadIdx.x / lanes;
    const u32 c = threadIdx.x % lanes * N;
    const u32 first = blockIdx.x * a.rows_per_block, last = min(a.rows, first + a.rows_per_block);
    float weight[N] = {}, dweight[N] = {};
    if (c < a.dim) load_fixed<N>(weight, a.weight + c);
    for (u32 base = first; base < last; base += ROWS * teams) {
        Words4 x[ROWS], dy[ROWS], addend[ROWS];
        float rstd[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const u32 r = base + k * teams + team;
            const bool mine = r < last && c < a.dim;
            const size_t at = (size_t)r * a.dim + c;
            x[k] = mine ? raw16(a.x + at) : Words4{};
            dy[k] = mine ? raw16(a.dy + at) : Words4{};
            addend[k] = mine && a.addend ? raw16(a.addend + at) : Words4{};
            rstd[k] = mine ? a.rstd[r] : 0.f;
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const u32 r = base + k * teams + team;
            float vx[N], vdy[N], d[N], xhat[N], g[N], sum = 0.f;
            unpack16(vx, x[k], a.x);
            unpack16(vdy, dy[k], a.x);
            unpack16(d, addend[k], a.x);
#pragma unroll
            for (int i = 0; i < N; i++) {
                xhat[i] = vx[i] * rstd[k];
                g[i] = vdy[i] * weight[i];
                sum += g[i] * xhat[i];
                dweight[i] += vdy[i] * xhat[i];
            }
            sum = sum_over(sum, lanes);
            if (r < last && c < a.dim)
                store_dx<N>(a.dx + (size_t)r * a.dim + c, d, xhat, g, rstd[k], 0.f, sum / (float)a.dim);
        }
    }
    // First the teams of a warp, then the warps.
#pragma unroll
    for (int i = 0; i < N; i++)
        for (u32 m = lanes; m < 32; m *= 2) dweight[i] += shfl_xor(dweight[i], (int)m);
    if (threadIdx.x % 32 < lanes) store<N>(columns[threadIdx.x / 32] + c, dweight);
    __syncthreads();
    if (threadIdx.x >= a.dim) return;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) total += columns[w][threadIdx.x];
    a.partial[(size_t)blockIdx.x * a.dim + threadIdx.x] = total;
}
using rms_norm_narrow_grad_f32_args = norm_grad_args<float>;
using rms_norm_narrow_grad_bf16_args = norm_grad_args<u16>;
KERNEL_RESIDENT(rms_norm_narrow_grad_f32, rms_norm_narrow_grad_f32_args, 256, 2) { rms_norm_narrow_grad(a); }
KERNEL_RESIDENT(rms_norm_narrow_grad_bf16, rms_norm_narrow_grad_bf16_args, 256, 2) { rms_norm_narrow_grad(a); }
