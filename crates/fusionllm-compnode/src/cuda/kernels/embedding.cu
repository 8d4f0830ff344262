#include "dev.h"
// Blocks of 128 threads, one for each row. Those that add up rows may use the registers that 8 loads of 16 bytes at a
// time need.

// out[row] = table[ids[row]]; table [any, dim], out [rows, dim]; grid = rows
template <class T> struct embedding_args {
    const T* table;
    const int* ids;
    T* out;
    u32 rows, dim;
};
template <int N, class T> DEV void embedding(const embedding_args<T>& a) {
    const T* from = a.table + (size_t)a.ids[blockIdx.x] * a.dim;
    T* to = a.out + (size_t)blockIdx.x * a.dim;
    for (u32 c = threadIdx.x * N; c < a.dim; c += 128 * N) {
        float v[N];
        load<N>(v, from + c);
        store<N>(to + c, v);
    }
}
using embedding_f32_args = embedding_args<float>;
using embedding_bf16_args = embedding_args<u16>;
KERNEL(embedding_f32, embedding_f32_args, 128) { BY_WIDTH(embedding, float, a.dim, a); }
KERNEL(embedding_bf16, embedding_bf16_args, 128) { BY_WIDTH(embedding, u16, a.dim, a); }

// sum[0..N] += rows row(first) .. row(last), in this order, at column c; 8 loads at a time are under way.
template <int N, class T, class R>
DEV void add_rows(float* sum, const T* x, u32 first, u32 last, u32 dim, u32 c, const R& row) {
    constexpr int AHEAD = 8;
    u32 k = first;
    for (; k + AHEAD <= last; k += AHEAD) {
        float v[AHEAD][N];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) load<N>(v[j], x + (size_t)row(k + j) * dim + c);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] += v[j][i];
    }
    for (; k < last; k++) {
        float v[N];
        load<N>(v, x + (size_t)row(k) * dim + c);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += v[i];
    }
}
template <int N> DEV void add_to(float* p, const float* sum) {
    float v[N];
    load<N>(v, p);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += sum[i];
    store<N>(p, v);
}

// grad[ids[u]] += sum of dy[order[k]] for k in starts[u] .. starts[u + 1]; dy [rows, dim], grad [any, dim], ids
// distinct. The host has sorted the rows by id, so that no two blocks write the same row. grid = number of ids
template <class T> struct embedding_grad_args {
    const T* dy;
    const u32 *order, *starts, *ids;
    float* grad;
    u32 dim;
};
template <int N, class T> DEV void embedding_grad(const embedding_grad_args<T>& a) {
    u32 first = a.starts[blockIdx.x], last = a.starts[blockIdx.x + 1];
    float* to = a.grad + (size_t)a.ids[blockIdx.x] * a.dim;
    for (u32 c = threadIdx.x * N; c < a.dim; c += 128 * N) {
        float sum[N] = {};
        add_rows<N>(sum, a.dy, first, last, a.dim, c, [&](u32 k) { return a.order[k]; });
        add_to<N>(to + c, sum);
    }
}
using embedding_grad_f32_args = embedding_grad_args<float>;
using embedding_grad_bf16_args = embedding_grad_args<u16>;
KERNEL_RESIDENT(embedding_grad_f32, embedding_grad_f32_args, 128, 8) { BY_WIDTH(embedding_grad, float, a.dim, a); }
KERNEL_RESIDENT(embedding_grad_bf16, embedding_grad_bf16_args, 128, 8) { BY_WIDTH(embedding_grad, u16, a.dim, a); }

// out[row] = x[row] + table[row % seq]; x, out [rows, dim], table [seq, dim]; grid = rows
template <class T> struct position_args {
    const T *x, *table;
    T* out;
    u32 rows, seq, dim;
};
template <int N, class T> DEV void position(const position_args<T>& a) {
    const T *x = a.x + (size_t)blockIdx.x * a.dim, *y = a.table + (size_t)(blockIdx.x % a.seq) * a.dim;
    T* to = a.out + (size_t)blockIdx.x * a.dim;
    for (u32 c = threadIdx.x * N; c < a.dim; c += 128 * N) {
        float v[N], w[N];
        load<N>(v, x + c);
        load<N>(w, y + c);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] += w[i];
        store<N>(to + c, v);
    }
}
using position_f32_args = position_args<float>;
using position_bf16_args = position_args<u16>;
KERNEL(position_f32, position_f32_args, 128) { BY_WIDTH(position, float, a.dim, a); }
KERNEL(position_bf16, position_bf16_args, 128) { BY_WIDTH(position, u16, a.dim, a); }

// grad[s] += sum over b of dy[b, s]; dy [batch, seq, dim], grad [seq, dim]; grid = seq
template <class T> struct position_grad_args {
    const T* dy;
    float* grad;
    u32 batch, seq, dim;
};
template <int N, class T> DEV void position_grad(const position_grad_args<T>& a) {
    float* to = a.grad + (size_t)blockIdx.x * a.dim;
    for (u32 c = threadIdx.x * N; c < a.dim; c += 128 * N) {
        float sum[N] = {};
        add_rows<N>(sum, a.dy, 0, a.batch, a.dim, c, [&](u32 b) { return b * a.seq + blockIdx.x; });
        add_to<N>(to + c, sum);
    }
}
using position_grad_f32_args = position_grad_args<float>;
using position_grad_bf16_args = position_grad_args<u16>;
KERNEL_RESIDENT(position_grad_f32, position_grad_f32_args, 128, 8) { BY_WIDTH(position_grad, float, a.dim, a); }
KERNEL_RESIDENT(position_grad_bf16, position_grad_bf16_args, 128, 8) { BY_WIDTH(position_grad, u16, a.dim, a); }
