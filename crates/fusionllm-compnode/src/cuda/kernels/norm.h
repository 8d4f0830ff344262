#pragma once
#include "dev.h"

// Norms of rows: layer norm, and, where CENTRED is false, the root-mean-square norm (Zhang and Sennrich, arXiv
// 1910.07467), which takes no mean away and has no bias: mean and bias are null then.

// Where a row of v = x + residual (rounded as T is stored) is read from: x may be a sum stored before, then residual is
// null.
template <class T> struct Row {
    const T *x, *residual;
};
template <int N, class T> DEV void load_row(float* v, Row<T> row, u32 c) {
    load<N>(v, row.x + c);
    if (row.residual) {
        float r[N];
        load<N>(r, row.residual + c);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = round_to<T>(v[i] + r[i]);
    }
}
template <bool CENTRED, int N, class T>
DEV void normalize(T* out, const float* v, const float* weight, const float* bias, u32 c, float mean, float rstd) {
    float w[N], b[N] = {}, o[N];
    load_fixed<N>(w, weight + c);
    if (CENTRED) load_fixed<N>(b, bias + c);
#pragma unroll
    for (int i = 0; i < N; i++) o[i] = CENTRED ? (v[i] - mean) * rstd * w[i] + b[i] : v[i] * rstd * w[i];
    store<N>(out + c, o);
}

template <class T> struct norm_args {
    const T *x, *residual;
    T* sum;
    const float *weight, *bias;
    T* out;
    float *mean, *rstd;
    u32 rows, dim;
    float eps;
};
// A row that fits into CHUNKS times 16 bytes a lane stays in registers, as stored: it is read once.
template <bool CENTRED, int CHUNKS, class T>
DEV void norm_in_registers(const norm_args<T>& a, Row<T> row, size_t at, u32 lane, float& mean, float& rstd) {
    constexpr int N = Per16<T>::n, TOGETHER = 4;
    Words4 kept[CHUNKS];
    float v[N], sum = 0.f, squares = 0.f;
#pragma unroll
    for (int from = 0; from < CHUNKS; from += TOGETHER) {
        Words4 added[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            u32 c = ((from + k) * 32 + lane) * N;
            if (c >= a.dim) break;
            kept[from + k] = raw16(row.x + c);
            if (row.residual) added[k] = raw16(row.residual + c);
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            u32 c = ((from + k) * 32 + lane) * N;
            if (c >= a.dim) break;
            unpack16(v, kept[from + k], row.x);
            if (row.residual) {
                float r[N];
                unpack16(r, added[k], row.x);
#pragma unroll
                for (int i = 0; i < N; i++) v[i] += r[i];
                kept[from + k] = pack16(v, row.x);
                unpack16(v, kept[from + k], row.x);
                if (a.sum) *(Words4*)(a.sum + at + c) = kept[from + k];
            }
#pragma unroll
            for (int i = 0; i < N; i++) (CENTRED ? sum : squares) += CENTRED ? v[i] : v[i] * v[i];
        }
    }
    if constexpr (CENTRED) {
        mean = warp_sum(sum) / (float)a.dim;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            if ((k * 32 + lane) * N >= a.dim) break;
            unpack16(v, kept[k], row.x);
#pragma unroll
            for (int i = 0; i < N; i++) squares += (v[i] - mean) * (v[i] - mean);
        }
    }
    rstd = rsqrtf(warp_sum(squares) / (float)a.dim + a.eps);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        u32 c = (k * 32 + lane) * N;
        if (c >= a.dim) break;
        unpack16(v, kept[k], row.x);
        normalize<CENTRED, N>(a.out + at, v, a.weight, a.bias, c, mean, rstd);
    }
}
// Any other row is read three times.
template <bool CENTRED, int N, class T>
DEV void norm_from_memory(const norm_args<T>& a, Row<T> row, size_t at, u32 lane, float& mean, float& rstd) {
    float sum = 0.f, squares = 0.f;
    for (u32 c = lane * N; c < a.dim; c += 32 * N) {
        float v[N];
        load_row<N>(v, row, c);
        if (row.residual && a.sum) store<N>(a.sum + at + c, v);
#pragma unroll
        for (int i = 0; i < N; i++) (CENTRED ? sum : squares) += CENTRED ? v[i] : v[i] * v[i];
    }
    if (row.residual && a.sum) row = {a.sum + at, nullptr};
    if constexpr (CENTRED) {
        mean = warp_sum(sum) / (float)a.dim;
        for (u32 c = lane * N; c < a.dim; c += 32 * N) {
            float v[N];
            load_row<N>(v, row, c);
#pragma unroll
            for (int i = 0; i < N; i++) squares += (v[i] - mean) * (v[i] - mean);
        }
    }
    rstd = rsqrtf(warp_sum(squares) / (float)a.dim + a.eps);
    for (u32 c = lane * N; c < a.dim; c += 32 * N) {
        float v[N];
        load_row<N>(v, row, c);
        normalize<CENTRED, N>(a.out + at, v, a.weight, a.bias, c, mean, rstd);
    }
}
// v = x, or x + residual rounded to T and stored in sum (if not null); out = (v - mean) * rstd * weight + bias by rows
// of dim, rstd = 1 / sqrt(variance + eps), variance over dim (not dim - 1). x, residual?, sum?, out [rows, dim];
// weight, bias [dim]; mean?, rstd? [rows]. One warp a row; grid = ceil(rows / 8). sum may be x or residual, but not
// out.
template <bool CENTRED, class T> DEV void norm(const norm_args<T>& a) {
    constexpr u32 CHUNK = 32 * Per16<T>::n;
    u32 r = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= a.rows) return;
    size_t at = (size_t)r * a.dim;
    Row<T> row = {a.x + at, a.residual ? a.residual + at : nullptr};
    float mean, rstd;
    if (a.dim % Per16<T>::n || a.dim > 16 * CHUNK)
        a.dim % Per16<T>::n == 0 ? norm_from_memory<CENTRED, Per16<T>::n>(a, row, at, lane, mean, rstd)
                                 : norm_from_memory<CENTRED, 1>(a, row, at, lane, mean, rstd);
    else if (a.dim > 4 * CHUNK)
        norm_in_registers<CENTRED, 16>(a, row, at, lane, mean, rstd);
    else
        norm_in_registers<CENTRED, 4>(a, row, at, lane, mean, rstd);
    if (lane == 0) {
        if (CENTRED && a.mean) a.mean[r] = mean;
        if (a.rstd) a.rstd[r] = rstd;
    }
}

template <class T> struct norm_grad_args {
    const T *dy, *x;
    const float *weight, *mean, *rstd;
    const T* addend;
    T* dx;
    float* partial;
    u32 rows, dim, rows_per_block;
};
// xhat = (x - mean) * rstd and g = dy * weight of N columns.
template <int N>
DEV void centre(float* xhat, float* g, const float* x, const float* dy, const float* weight, u32 c, float mean,
                float rstd) {
    float w[N];
    load_fixed<N>(w, weight + c);
#pragma unroll
    for (int i = 0; i < N; i++) {
        xhat[i] = (x[i] - mean) * rstd;
        g[i] = dy[i] * w[i];
    }
}
template <int N, class T>
DEV void store_dx(T* dx, float* addend, const float* xhat, const float* g, float rstd, float mean_g, float mean_gx) {
#pragma unroll
    for (int i = 0; i < N; i++) addend[i] += rstd * (g[i] - mean_g - xhat[i] * mean_gx);
    store<N>(dx, addend);
}
// Rows of up to 8 * 32 * CHUNKS * 16 bytes: a team of 1, 2, 4 or 8 warps takes a row; each thread has the same CHUNKS *
// 16 bytes of columns in each row, and keeps their sums for weight and bias in registers.
template <bool CENTRED, int CHUNKS, class T>
DEV void norm_grad_by_teams(const norm_grad_args<T>& a, u32 first, u32 last, u32 warps) {
    constexpr int N = Per16<T>::n;
    // By columns, so that teams can add what they have one after the other; a row is at most 4 warps' columns where
    // teams > 1.
    __shared__ __align__(16) float columns[2][4 * 32 * CHUNKS * N];
    __shared__ float sums[2][8][2];
    u32 warp = threadIdx.x / 32, team = warp / warps, teams = 8 / warps, lane = threadIdx.x % (32 * warps);
    float dweight[CHUNKS][N] = {}, dbias[CHUNKS][N] = {};
    for (u32 base = first, turn = 0; base < last; base += teams, turn ^= 1) {
        u32 r = base + team;
        bool mine = r < last;
        size_t at = (size_t)r * a.dim;
        Words4 x[CHUNKS], dy[CHUNKS], addend[CHUNKS];
        float mean = 0.f, rstd = 0.f, sum_g = 0.f, sum_gx = 0.f;
        if (mine) {
            if (CENTRED) mean = a.mean[r];
            rstd = a.rstd[r];
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) {
                u32 c = (k * 32 * warps + lane) * N;
                if (c >= a.dim) break;
                x[k] = raw16(a.x + at + c);
                dy[k] = raw16(a.dy + at + c);
                if (a.addend) addend[k] = raw16(a.addend + at + c);
            }
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) {
                u32 c = (k * 32 * warps + lane) * N;
                if (c >= a.dim) break;
                float vx[N], vdy[N], xhat[N], g[N];
                unpack16(vx, x[k], a.x);
                unpack16(vdy, dy[k], a.x);
                centre<N>(xhat, g, vx, vdy, a.weight, c, mean, rstd);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    if (CENTRED) sum_g += g[i];
                    sum_gx += g[i] * xhat[i];
                    dweight[k][i] += vdy[i] * xhat[i];
                    if (CENTRED) dbias[k][i] += vdy[i];
                }
            }
        }
        if (CENTRED) sum_g = warp_sum(sum_g);
        sum_gx = warp_sum(sum_gx);
        if (warps > 1) {
            if (threadIdx.x % 32 == 0) {
                sums[turn][warp][0] = sum_g;
                sums[turn][warp][1] = sum_gx;
            }
            __syncthreads();
            sum_g = sum_gx = 0.f;
            for (u32 w = team * warps; w < (team + 1) * warps; w++) {
                sum_g += sums[turn][w][0];
                sum_gx += sums[turn][w][1];
            }
        }
        if (!mine) continue;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            u32 c = (k * 32 * warps + lane) * N;
            if (c >= a.dim) break;
            float vx[N], vdy[N], xhat[N], g[N], d[N] = {};
            unpack16(vx, x[k], a.x);
            unpack16(vdy, dy[k], a.x);
            if (a.addend) unpack16(d, addend[k], a.x);
            centre<N>(xhat, g, vx, vdy, a.weight, c, mean, rstd);
            store_dx<N>(a.dx + at + c, d, xhat, g, rstd, sum_g / (float)a.dim, sum_gx / (float)a.dim);
        }
    }
    float* out = a.partial + (size_t)blockIdx.x * (CENTRED ? 2 : 1) * a.dim;
    for (u32 t = 0; t < teams; t++) {
        if (t == team) {
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) {
                u32 c = (k * 32 * warps + lane) * N;
                if (c >= a.dim) break;
                float v[N];
                if (t > 0) {
                    load<N>(v, columns[0] + c);
#pragma unroll
                    for (int i = 0; i < N; i++) dweight[k][i] += v[i];
                    if constexpr (CENTRED) {
                        load<N>(v, columns[1] + c);
#pragma unroll
                        for (int i = 0; i < N; i++) dbias[k][i] += v[i];
                    }
                }
                bool end = t + 1 == teams;
                store<N>(end ? out + c : columns[0] + c, dweight[k]);
                if (CENTRED) store<N>(end ? out + a.dim + c : columns[1] + c, dbias[k]);
            }
        }
        if (teams > 1) __syncthreads();
    }
}
// Any other row: the block takes rows one by one, reads each twice, and adds to the sums where they lie in memory.
template <bool CENTRED, int N, class T> DEV void norm_grad_by_blocks(const norm_grad_args<T>& a, u32 first, u32 last) {
    __shared__ float sums[2][2][8];
    float* out = a.partial + (size_t)blockIdx.x * (CENTRED ? 2 : 1) * a.dim;
    for (u32 r = first, turn = 0; r < last; r++, turn ^= 1) {
        const T *x = a.x + (size_t)r * a.dim, *dy = a.dy + (size_t)r * a.dim;
        float mean = CENTRED ? a.mean[r] : 0.f, rstd = a.rstd[r], sum_g = 0.f, sum_gx = 0.f;
        for (u32 c = threadIdx.x * N; c < a.dim; c += 256 * N) {
            float vx[N], vdy[N], xhat[N], g[N], w[N], b[N];
            load<N>(vx, x + c);
            load<N>(vdy, dy + c);
            centre<N>(xhat, g, vx, vdy, a.weight, c, mean, rstd);
            if (r > first) {
                load<N>(w, out + c);
                if (CENTRED) load<N>(b, out + a.dim + c);
            }
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (CENTRED) sum_g += g[i];
                sum_gx += g[i] * xhat[i];
                w[i] = (r > first ? w[i] : 0.f) + vdy[i] * xhat[i];
                if (CENTRED) b[i] = (r > first ? b[i] : 0.f) + vdy[i];
            }
            store<N>(out + c, w);
            if (CENTRED) store<N>(out + a.dim + c, b);
        }
        float mean_g = CENTRED ? block_sum<256>(sum_g, sums[turn][0]) / (float)a.dim : 0.f,
              mean_gx = block_sum<256>(sum_gx, sums[turn][1]) / (float)a.dim;
        for (u32 c = threadIdx.x * N; c < a.dim; c += 256 * N) {
            float vx[N], vdy[N], xhat[N], g[N], d[N] = {};
            load<N>(vx, x + c);
            load<N>(vdy, dy + c);
            if (a.addend) load<N>(d, a.addend + (size_t)r * a.dim + c);
            centre<N>(xhat, g, vx, vdy, a.weight, c, mean, rstd);
            store_dx<N>(a.dx + (size_t)r * a.dim + c, d, xhat, g, rstd, mean_g, mean_gx);
        }
    }
}
// dx = BP of the norm at its input v (here x), plus addend unless it is null; partial[block][0] = sum over the
// block's rows of dy * xhat, partial[block][1] = sum of dy: what `fold` adds up to the gradients of weight and bias.
// dy, x, addend?, dx [rows, dim]; partial [blocks, 2, dim], or [blocks, dim] if not CENTRED; grid = ceil(rows /
// rows_per_block), 256 threads. dx may be dy or addend.
template <bool CENTRED, class T> DEV void norm_grad(const norm_grad_args<T>& a) {
    constexpr u32 CHUNKS = sizeof(T) == 2 ? 3 : 4, WARP = 32 * CHUNKS * Per16<T>::n;
    u32 first = blockIdx.x * a.rows_per_block, last = min(a.rows, first + a.rows_per_block);
    if (a.dim % Per16<T>::n || a.dim > 8 * WARP)
        a.dim % Per16<T>::n == 0 ? norm_grad_by_blocks<CENTRED, Per16<T>::n>(a, first, last)
                                 : norm_grad_by_blocks<CENTRED, 1>(a, first, last);
    else
        norm_grad_by_teams<CENTRED, CHUNKS>(a, first, last,
                                            a.dim <= WARP       ? 1
                                            : a.dim <= 2 * WARP ? 2
                                            : a.dim <= 4 * WARP ? 4
                                                                : 8);
}
