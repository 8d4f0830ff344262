#include "dev.h"

template <class T> struct cross_entropy_args {
    const T* logits;
    const int* labels;
    float* losses;
    T* grad;
    u32 vocab, stride;
    float scale;
};
// The maximum m and the sum s of e^(x - m) over what was seen so far.
struct Running {
    float m, s;
};
template <int N, class T> DEV void see(Running& r, const float* x) {
    float m = r.m;
#pragma unroll
    for (int i = 0; i < N; i++) m = fmaxf(m, x[i]);
    float s = r.s * exp_for<T>(r.m - m);
#pragma unroll
    for (int i = 0; i < N; i++) s += exp_for<T>(x[i] - m);
    r = {m, s};
}
// losses[row] = log sum e^x - x[label]; grad[row] = (softmax - onehot(label)) * scale, 0 in the columns vocab..stride.
// A row with a label below 0 takes no part: its loss and gradient are 0. If the last label is one, it is minus the weight w
// of each other row, as the bits of a float: losses are times rows * w then, and gradients times w in the place of scale.
// logits, grad? [rows, stride], may be the same memory; labels, losses [rows]; what logits hold behind vocab does not
// matter. Where a row is no multiple of 16 bytes, elements go one by one. A block takes a row (grid = rows). The thread's first CHUNKS times 16
// bytes stay in registers, so that a row of up to THREADS * CHUNKS * 16 bytes is read once; what is beyond is read
// again for grad.
template <int THREADS, int CHUNKS, class T> DEV void cross_entropy(const cross_entropy_args<T>& a) {
    constexpr int N = Per16<T>::n;
    constexpr u32 STEP = THREADS * N;
    __shared__ float shared[2][THREADS / 32];
    const T* row = a.logits + (size_t)blockIdx.x * a.stride;
    // Columns from `whole` on, fewer than 16 bytes of vocab and what follows it, go one by one.
    u32 start = threadIdx.x * N, whole = a.stride % N ? 0 : a.vocab / N * N, label = (u32)a.labels[blockIdx.x];
    u32 last = (u32)a.labels[gridDim.x - 1];
    bool counts = (int)label >= 0, weighted = (int)last < 0;
    float weight = -bits_f32(last), scale = weighted ? weight : a.scale;
    float at_label = threadIdx.x == 0 && counts ? get(row[label]) : 0.f;
    Words4 kept[CHUNKS];
    Running r = {LOWEST, 0.f};
    float x[N];
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
        if (start + k * STEP < whole) kept[k] = raw16(row + start + k * STEP);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        if (start + k * STEP >= whole) break;
        unpack16(x, kept[k], row);
        see<N, T>(r, x);
    }
#pragma unroll 2
    for (u32 c = start + CHUNKS * STEP; c < whole; c += STEP) {
        load<N>(x, row + c);
        see<N, T>(r, x);
    }
    for (u32 c = whole + threadIdx.x; c < a.vocab; c += THREADS) {
        x[0] = get(row[c]);
        see<1, T>(r, x);
    }
    float m = warp_max(r.m), s = warp_sum(r.s * exp_for<T>(r.m - m));
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
        shared[0][warp] = m;
        shared[1][warp] = s;
    }
    __syncthreads();
    float warp_m = lane < THREADS / 32 ? shared[0][lane] : LOWEST, warp_s = lane < THREADS / 32 ? shared[1][lane] : 0.f;
    m = warp_max(warp_m);
    s = warp_sum(warp_s * exp_for<T>(warp_m - m));
    if (threadIdx.x == 0) {
        float loss = m + logf(s) - at_label;
        a.losses[blockIdx.x] = !counts ? 0.f : weighted ? loss * (weight * (float)gridDim.x) : loss;
    }
    if (!a.grad) return;
    T* grad = a.grad + (size_t)blockIdx.x * a.stride;
    if (!counts) scale = 0.f;
    float factor = scale / s;
    auto slope = [&](float x, u32 c) { return exp_for<T>(x - m) * factor - (c == label ? scale : 0.f); };
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        u32 c = start + k * STEP;
        if (c >= whole) break;
        unpack16(x, kept[k], row);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = slope(x[i], c + i);
        store<N>(grad + c, x);
    }
#pragma unroll 2
    for (u32 c = start + CHUNKS * STEP; c < whole; c += STEP) {
        load<N>(x, row + c);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = slope(x[i], c + i);
        store<N>(grad + c, x);
    }
    for (u32 c = whole + threadIdx.x; c < a.stride; c += THREADS)
        put(grad + c, c < a.vocab ? slope(get(row[c]), c) : 0.f);
}
using cross_entropy_f32_args = cross_entropy_args<float>;
using cross_entropy_bf16_args = cross_entropy_args<u16>;
using cross_entropy_small_f32_args = cross_entropy_f32_args;
using cross_entropy_small_bf16_args = cross_entropy_bf16_args;
KERNEL(cross_entropy_f32, cross_entropy_f32_args, 1024) { cross_entropy<1024, 7>(a); }
KERNEL(cross_entropy_bf16, cross_entropy_bf16_args, 1024) { cross_entropy<1024, 7>(a); }
// The same for a small vocabulary, up to about 16,000: more rows are under way on a multiprocessor at once.
KERNEL(cross_entropy_small_f32, cross_entropy_small_f32_args, 256) { cross_entropy<256, 8>(a); }
KERNEL(cross_entropy_small_bf16, cross_entropy_small_bf16_args, 256) { cross_entropy<256, 8>(a); }
