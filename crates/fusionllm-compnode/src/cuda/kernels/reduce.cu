#include "dev.h"
// Sums, in two stages where more than one block adds, always in the same order.

// partial[part][c] = sum of x[r][c] over the rows r of the part; x [rows, columns], partial [parts, columns];
// grid = (ceil(columns / 128), ceil(rows / rows_per_part)), 128 threads. 128 / N threads stand side by side on a row, N
// = 16 bytes of T; the N lines of threads take rows in turn, and are added up at the end. Eight blocks on a
// multiprocessor leave the registers for eight loads of 16 bytes at a time.
template <class T> struct column_sum_args {
    const T* x;
    float* partial;
    u32 rows, columns, rows_per_part;
};
template <class T> DEV void column_sum(const column_sum_args<T>& a) {
    constexpr int N = Per16<T>::n, AHEAD = 8;
    __shared__ __align__(16) float shared[N][128];
    u32 first = blockIdx.y * a.rows_per_part, last = min(a.rows, first + a.rows_per_part);
    float* out = a.partial + (size_t)blockIdx.y * a.columns;
    u32 own = blockIdx.x * 128 + threadIdx.x;
    if (a.columns % N) {
        if (own >= a.columns) return;
        float sum = 0.f;
#pragma unroll 8
        for (u32 r = first; r < last; r++) sum += get(a.x[(size_t)r * a.columns + own]);
        out[own] = sum;
        return;
    }
    u32 line = threadIdx.x / (128 / N), place = threadIdx.x % (128 / N) * N, c = blockIdx.x * 128 + place;
    float sum[N] = {}, v[N];
    if (c < a.columns) {
        const T* x = a.x + c;
        u32 r = first + line;
        for (; r + (AHEAD - 1) * N < last; r += AHEAD * N) {
            Words4 raw[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) raw[k] = raw16(x + (size_t)(r + k * N) * a.columns);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                unpack16(v, raw[k], x);
#pragma unroll
                for (int i = 0; i < N; i++) sum[i] += v[i];
            }
        }
        for (; r < last; r += N) {
            load<N>(v, x + (size_t)r * a.columns);
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] += v[i];
        }
    }
    store<N>(&shared[line][place], sum);
    __syncthreads();
    if (own >= a.columns) return;
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < N; k++) total += shared[k][threadIdx.x];
    out[own] = total;
}
using column_sum_f32_args = column_sum_args<float>;
using column_sum_bf16_args = column_sum_args<u16>;
KERNEL_RESIDENT(column_sum_f32, column_sum_f32_args, 128, 8) { column_sum(a); }
KERNEL_RESIDENT(column_sum_bf16, column_sum_bf16_args, 128, 8) { column_sum(a); }

// out[c] += sum over p of partial[p * stride + c], c < columns. A warp takes 32 neighbouring columns and every eighth
// p; the eight warps are added up at the end. 256 threads; grid = ceil(columns / 32), or fewer: blocks go on to further
// columns.
struct fold_args {
    const float* partial;
    float* out;
    u32 parts, stride, columns;
};
KERNEL(fold, fold_args, 256) {
    __shared__ float shared[8][32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 base = blockIdx.x * 32; base < a.columns; base += gridDim.x * 32) {
        u32 c = base + lane;
        float sum = 0.f;
        if (c < a.columns) {
            const float* p = a.partial + c;
#pragma unroll 8
            for (u32 k = warp; k < a.parts; k += 8) sum += p[(size_t)k * a.stride];
        }
        shared[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && c < a.columns) {
            float total = shared[0][lane];
#pragma unroll
            for (int w = 1; w < 8; w++) total += shared[w][lane];
            a.out[c] += total;
        }
        __syncthreads();
    }
}

// out = (sum of losses[0..count], in double) / count; one block of 256 threads.
struct mean_loss_args {
    const float* losses;
    float* out;
    u32 count;
};
KERNEL(mean_loss, mean_loss_args, 256) {
    __shared__ double shared[8];
    double sum = 0.;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < a.count; i += 256) sum += a.losses[i];
    sum = block_sum<256>(sum, shared);
    if (threadIdx.x == 0) *a.out = (float)(sum / a.count);
}
