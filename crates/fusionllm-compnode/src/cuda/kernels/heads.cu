#include "dev.h"
// What attention needs beside matrix products where it is not one kernel, in f32.

// x [batch, seq, parts, heads, dim] -> out [parts, batch, heads, seq, dim], and back. A thread moves four neighbours;
// grid = ceil(elements / 1024), 256 threads.
struct heads_args {
    const float* x;
    float* out;
    u32 batch, seq, parts, heads, dim;
};
// Where element i of [batch, seq, parts, heads, dim] lies in [parts, batch, heads, seq, dim].
DEV u32 by_heads(const heads_args& a, u32 i) {
    u32 c = i % a.dim, row = i / a.dim;
    u32 h = row % a.heads;
    row /= a.heads;
    u32 p = row % a.parts;
    row /= a.parts;
    u32 s = row % a.seq, b = row / a.seq;
    return (((p * a.batch + b) * a.heads + h) * a.seq + s) * a.dim + c;
}
template <bool TO_HEADS> DEV void move_heads(const heads_args& a) {
    u32 count = a.batch * a.seq * a.parts * a.heads * a.dim, i = blockIdx.x * 1024 + threadIdx.x * 4;
    if (a.dim % 4 == 0) {
        if (i >= count) return;
        u32 j = by_heads(a, i);
        float v[4];
        load<4>(v, a.x + (TO_HEADS ? i : j));
        store<4>(a.out + (TO_HEADS ? j : i), v);
    } else {
        for (int k = 0; k < 4; k++, i++)
            if (i < count) a.out[TO_HEADS ? by_heads(a, i) : i] = a.x[TO_HEADS ? i : by_heads(a, i)];
    }
}
using to_heads_args = heads_args;
using from_heads_args = heads_args;
KERNEL(to_heads, to_heads_args, 256) { move_heads<true>(a); }
KERNEL(from_heads, from_heads_args, 256) { move_heads<false>(a); }

// The keys that query row % seq sees: all, or those up to itself.
DEV u32 seen_keys(u32 seq, u32 causal) { return causal ? blockIdx.x % seq + 1 : seq; }

// scores[row] = softmax(scores[row] * scale) in place, 0 where the query may not look; lse[row] (if not null) = log sum
// e^(score * scale). scores [batch * heads * seq, seq]; row r is query r % seq. A block takes a row: grid = batch *
// heads * seq, 256 threads.
struct softmax_args {
    float *scores, *lse;
    u32 seq, causal;
    float scale;
};
template <int N> DEV void softmax_row(const softmax_args& a) {
    __shared__ float shared[2][8];
    float* row = a.scores + (size_t)blockIdx.x * a.seq;
    u32 seen = seen_keys(a.seq, a.causal), warp = threadIdx.x / 32;
    float m = LOWEST, s = 0.f;
    for (u32 c = threadIdx.x * N; c < a.seq; c += 256 * N) {
        if (c >= seen) break;
        float v[N], top = m;
        load<N>(v, row + c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i] = c + i < seen ? v[i] * a.scale : LOWEST;
            top = fmaxf(top, v[i]);
        }
        s *= expf(m - top);
#pragma unroll
        for (int i = 0; i < N; i++) s += expf(v[i] - top);
        m = top;
    }
    float warp_m = warp_max(m);
    s = warp_sum(s * expf(m - warp_m));
    if (threadIdx.x % 32 == 0) {
        shared[0][warp] = warp_m;
        shared[1][warp] = s;
    }
    __syncthreads();
    m = LOWEST, s = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) m = fmaxf(m, shared[0][w]);
#pragma unroll
    for (int w = 0; w < 8; w++) s += shared[1][w] * expf(shared[0][w] - m);
    if (a.lse && threadIdx.x == 0) a.lse[blockIdx.x] = m + logf(s);
    float inverse = 1.f / s;
    for (u32 c = threadIdx.x * N; c < a.seq; c += 256 * N) {
        float v[N] = {};
        if (c < seen) {
            load<N>(v, row + c);
#pragma unroll
            for (int i = 0; i < N; i++) v[i] = c + i < seen ? expf(v[i] * a.scale - m) * inverse : 0.f;
        }
        store<N>(row + c, v);
    }
}
KERNEL(softmax, softmax_args, 256) { BY_WIDTH(softmax_row, float, a.seq, a); }

// p = e^(scores * scale - lse[row]), 0 where the query may not look, written over scores; dp = p * (dp - dot[row]) *
// scale, written over dp: the gradient of the unscaled scores, dot[row] being sum of p * dp. Shapes and grid as in
// softmax.
struct softmax_grad_args {
    float *scores, *dp;
    const float *lse, *dot;
    u32 seq, causal;
    float scale;
};
template <int N> DEV void softmax_grad_row(const softmax_grad_args& a) {
    size_t at = (size_t)blockIdx.x * a.seq;
    u32 seen = seen_keys(a.seq, a.causal);
    float lse = a.lse[blockIdx.x], dot = a.dot[blockIdx.x];
    for (u32 c = threadIdx.x * N; c < a.seq; c += 256 * N) {
        float p[N] = {}, d[N] = {};
        if (c < seen) {
            load<N>(p, a.scores + at + c);
            load<N>(d, a.dp + at + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                p[i] = c + i < seen ? expf(p[i] * a.scale - lse) : 0.f;
                d[i] = c + i < seen ? p[i] * (d[i] - dot) * a.scale : 0.f;
            }
        }
        store<N>(a.scores + at + c, p);
        store<N>(a.dp + at + c, d);
    }
}
KERNEL(softmax_grad, softmax_grad_args, 256) { BY_WIDTH(softmax_grad_row, float, a.seq, a); }

// out[r] = sum of a[r] * b[r]; a, b [rows, dim]. One warp a row; grid = ceil(rows / 8), 256 threads.
struct row_dot_args {
    const float *a, *b;
    float* out;
    u32 rows, dim;
};
template <int N> DEV void dot_of_row(const row_dot_args& a) {
    u32 r = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= a.rows) return;
    size_t at = (size_t)r * a.dim;
    float sum = 0.f;
    for (u32 c = lane * N; c < a.dim; c += 32 * N) {
        float v[N], w[N];
        load<N>(v, a.a + at + c);
        load<N>(w, a.b + at + c);
#pragma unroll
        for (int i = 0; i < N; i++) sum += v[i] * w[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) a.out[r] = sum;
}
KERNEL(row_dot, row_dot_args, 256) { BY_WIDTH(dot_of_row, float, a.dim, a); }
