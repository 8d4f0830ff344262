#pragma once
#include "inputs.h"

// Gradients of attention.cu's attention, bf16, from sm_80 (FlashAttention-2: Dao, arXiv 2307.08691). The probabilities
// are computed again from the log-sum-exp that the forward kept: p = exp(q k^T * scale - lse), ds = p * (d_out v^T -
// dot), and then d_v = p^T d_out, d_k = ds^T q * scale, d_q = ds k * scale. Keys and queries have a kernel each: every
// sum has a fixed order, at the price of computing p and ds twice.
//
// Tiles (threads a block: 128; shared memory at most 48 KB):
//   attention_dot      grid = ceil(batch * seq * heads * D / 1024)
//   attention_kv_grad  grid = (ceil(seq / 64), batch * heads of keys), 64 keys a block
//   attention_q_grad   grid = (ceil(seq / 64), batch * heads), 64 queries a block

constexpr float LOG2_E = 1.44269504f;

// dot[b, h, s] = sum of out * d_out over a head's values: what softmax's gradient subtracts. D / 8 lanes have a row, 16
// bytes each.
template <int D> DEV void attention_dot(const attention_dot_args<u16>& a) {
    constexpr int LANES = D / 8;
    const size_t row = ((size_t)blockIdx.x * 128 + threadIdx.x) / LANES;
    const bool valid = row < (size_t)a.batch * a.seq * a.heads;
    float sum = 0.f;
    if (valid) {
        size_t at = row * D + threadIdx.x % LANES * 8;
        float x[8], y[8];
        load16(x, a.out + at);
        load16(y, a.d_out + at);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += x[i] * y[i];
    }
#pragma unroll
    for (int m = LANES / 2; m; m >>= 1) sum += shfl_xor(sum, m);
    if (valid && threadIdx.x % LANES == 0) {
        size_t head = row % a.heads, position = row / a.heads;
        a.dot[(position / a.seq * a.heads + head) * a.seq + position % a.seq] = sum;
    }
}

// The fragments of 16 rows of a tile as the rows of a.
template <int D> DEV void load_rows(u32 (*a)[4], const u16* rows, int at_a) {
#pragma unroll
    for (int c = 0; c < D / 16; c++) load_a(a[c], rows, at_a, c);
}
// acc[m] (16x16) += the 16 rows whose fragments are a[m], times 16 rows of a tile, transposed.
template <int D, int STRIPS>
DEV void add_dots(float (*acc)[2][4], const u32 (*a)[D / 16][4], const u16* rows, int at_b) {
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        u32 b[4];
        load_b(b, rows, at_b, c);
#pragma unroll
        for (int m = 0; m < STRIPS; m++) {
            mma(acc[m][0], a[m][c], b);
            mma(acc[m][1], a[m][c], b + 2);
        }
    }
}
// acc[m] (16 rows, D columns) += p[m] (16x16, rounded to bf16) times 16 rows of a tile.
template <int D, int STRIPS>
DEV void add_product(float (*acc)[D / 8][4], const float (*p)[2][4], const u16* rows, int at_a) {
    u32 a[STRIPS][4];
#pragma unroll
    for (int m = 0; m < STRIPS; m++) accumulators_to_a(a[m], p[m][0], p[m][1]);
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        u32 b[4];
        load_b_rows(b, rows, at_a, n);
#pragma unroll
        for (int m = 0; m < STRIPS; m++) {
            mma(acc[m][2 * n], a[m], b);
            mma(acc[m][2 * n + 1], a[m], b + 2);
        }
    }
}

// d_k and d_v of 64 keys of one head, summed over the heads of queries that it serves, one after the other. A warp has
// 16 keys and computes transposed, keys by queries, so that p^T and ds^T come out of one product as the next one needs
// them. All warps go over the same tiles of QUERIES queries, of which the next is copied while one is computed with.
// IN_REGISTERS says whether the warp's rows of k and v stay there, or are read from shared memory for each tile.
template <int D, int QUERIES, bool IN_REGISTERS, class A> DEV void attention_kv_grad(const A& a) {
    constexpr int THREADS = 128, KEYS = 64;
    static_assert(QUERIES <= 32, "a lane keeps the log-sum-exp of one query");
    __shared__ __align__(128) u16 k_tile[KEYS * D];
    __shared__ __align__(128) u16 v_tile[KEYS * D];
    __shared__ __align__(128) u16 q_tile[2][QUERIES * D];
    __shared__ __align__(128) u16 g_tile[2][QUERIES * D];  // d_out
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int seq = (int)a.seq, heads = (int)kv_heads(a);
    const int batch = (int)blockIdx.y / heads, head = first_served(a, (int)blockIdx.y % heads);
    // With a causal mask the first keys have the most queries, and their blocks start first.
    const int first_key = (int)blockIdx.x * KEYS, warp_key = first_key + warp * 16;
    const int first_tile = a.causal ? first_key / QUERIES : 0, tiles = (seq + QUERIES - 1) / QUERIES;
    const u32 part = a.heads * D, stride = (A::GROUPED ? 1 : 3) * part;
    const u32 kv_stride = kv_step<D>(a, stride);
    const size_t start = (size_t)batch * seq * stride + (size_t)head * D;
    const u16* q = queries(a) + start;
    const u16* g = a.d_out + (size_t)batch * seq * part + (size_t)head * D;
    const int at_a = lane_a<D>(lane), at_b = lane_b<D>(lane);
    u16* const my_k = k_tile + warp * 16 * D;
    u16* const my_v = v_tile + warp * 16 * D;
    const float scale = a.scale * LOG2_E;

    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    u32 ka[D / 16][4], va[D / 16][4];

    copy_tile<D, KEYS, THREADS>(k_tile, key_place<D>(a, q + part, (size_t)batch * seq, head), kv_stride, first_key,
                                seq);
    copy_tile<D, KEYS, THREADS>(v_tile, value_place<D>(a, q + 2 * part, (size_t)batch * seq, head), kv_stride,
                                first_key, seq);
    copy_tile<D, QUERIES, THREADS>(q_tile[first_tile & 1], q, stride, first_tile * QUERIES, seq);
    copy_tile<D, QUERIES, THREADS>(g_tile[first_tile & 1], g, part, first_tile * QUERIES, seq);
    cp_commit();
    // Each lane keeps the log-sum-exp and the dot of one query of the tile, loaded one tile ahead. Queries past the end
    // have zeros in q and d_out and so add nothing, as long as their p is a number: it is 1 with a log-sum-exp of 0.
    float next_lse = 0.f, next_dot = 0.f;
    u32 rows = served(a) * blockIdx.y * a.seq;
    auto load_queries = [&](int tile) {
        const int query = tile * QUERIES + lane % QUERIES;
        const u32 row = rows + query;
        next_lse = query < seq ? a.lse[row] : 0.f;
        next_dot = query < seq ? a.dot[row] : 0.f;
    };
    load_queries(first_tile);
    // Tiles count on from head to head.
    const int end = first_tile + (int)served(a) * (tiles - first_tile);
    int ahead = first_tile;
    for (int i = first_tile; i < end; i++) {
        const int tile = A::GROUPED ? ahead : i;
        // After the barrier tile i is there for all warps, and none reads tile i-1 any more.
        cp_wait<0>();
        __syncthreads();
        const float my_lse = next_lse * LOG2_E, minus_dot = -next_dot;
        if (i + 1 < end) {
            if (A::GROUPED && ++ahead == tiles) {
                ahead = first_tile;
                q += D;
                g += D;
                rows += a.seq;
            }
            copy_tile<D, QUERIES, THREADS>(q_tile[(i + 1) & 1], q, stride, (A::GROUPED ? ahead : i + 1) * QUERIES, seq);
            copy_tile<D, QUERIES, THREADS>(g_tile[(i + 1) & 1], g, part, (A::GROUPED ? ahead : i + 1) * QUERIES, seq);
            cp_commit();
            load_queries(A::GROUPED ? ahead : i + 1);
        }
        if (IN_REGISTERS && i == first_tile) {
            load_rows<D>(ka, my_k, at_a);
            load_rows<D>(va, my_v, at_a);
        }
        const u16* q_rows = q_tile[i & 1];
        const u16* g_rows = g_tile[i & 1];
        const int first_query = tile * QUERIES;
        if (warp_key >= seq) continue;

// Not unrolled: two steps at once need more registers than three blocks on a multiprocessor leave.
#pragma unroll 1
        for (int step = 0; step < QUERIES; step += 16, q_rows += 16 * D, g_rows += 16 * D) {
            const int query = first_query + step;
            if (a.causal && query + 16 <= warp_key) continue;
            float p[2][4] = {}, ds[2][4];
            if (!IN_REGISTERS) load_rows<D>(ka, my_k, at_a);
            add_dots<D, 1>(&p, &ka, q_rows, at_b);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float l[2], d[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    l[i] = shfl(my_lse, step + n * 8 + mma_column(lane, i));
                    d[i] = shfl(minus_dot, step + n * 8 + mma_column(lane, i));
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[n][i] = exp2_fast(p[n][i] * scale - l[i & 1]);
                    ds[n][i] = d[i & 1];
                }
            }
            // Only steps on the diagonal have queries to hide.
            if (a.causal && query < warp_key + 15) {
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int column = query + n * 8 + mma_column(lane, i);
                        p[n][i] = column < warp_key + mma_row(lane, i) ? 0.f : p[n][i];
                    }
            }
            add_product<D, 1>(&dv, &p, g_rows, at_a);
            if (!IN_REGISTERS) load_rows<D>(va, my_v, at_a);
            add_dots<D, 1>(&ds, &va, g_rows, at_b);
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) ds[n][i] *= p[n][i];
            add_product<D, 1>(&dk, &ds, q_rows, at_a);
        }
    }
    if (warp_key >= seq) return;
    store_rows<D>(dk, a.scale, a.scale, my_k,
                  d_key_place<D>(a, d_queries(a) + start + part, (size_t)batch * seq, head), kv_stride, warp_key, seq);
    store_rows<D>(dv, 1.f, 1.f, my_v,
                  d_value_place<D>(a, d_queries(a) + start + 2 * part, (size_t)batch * seq, head), kv_stride, warp_key,
                  seq);
}

// d_q of QUERIES queries of one head: a warp has STRIPS * 16 of them, whose rows of q and d_out stay in registers; all
// warps go over the same tiles of keys, of which the next is copied while one is computed with.
template <int D, int KEYS, int STRIPS, class A> DEV void attention_q_grad(const A& a) {
    constexpr int THREADS = 128, ROWS = 16 * STRIPS, QUERIES = THREADS / 32 * ROWS;
    __shared__ __align__(128) u16 q_tile[QUERIES * D];
    __shared__ __align__(128) u16 g_tile[QUERIES * D];  // d_out
    __shared__ __align__(128) u16 k_tile[2][KEYS * D];
    __shared__ __align__(128) u16 v_tile[2][KEYS * D];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int seq = (int)a.seq, heads = (int)a.heads;
    const int batch = (int)blockIdx.y / heads, head = (int)blockIdx.y % heads;
    // With a causal mask the last queries have the most keys: they go first.
    const int first_query = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, warp_query = first_query + warp * ROWS;
    const int keys = a.causal ? min(first_query + QUERIES, seq) : seq, tiles = (keys + KEYS - 1) / KEYS;
    const u32 part = a.heads * D, stride = (A::GROUPED ? 1 : 3) * part;
    const u32 kv_stride = kv_step<D>(a, stride);
    const size_t start = (size_t)batch * seq * stride + (size_t)head * D;
    const u16* q = queries(a) + start;
    const u16* k = key_place<D>(a, q + part, (size_t)batch * seq, head);
    const u16* v = value_place<D>(a, k + part, (size_t)batch * seq, head);
    const u16* g = a.d_out + (size_t)batch * seq * part + (size_t)head * D;
    const int at_a = lane_a<D>(lane), at_b = lane_b<D>(lane);
    u16* const my_q = q_tile + warp * ROWS * D;
    u16* const my_g = g_tile + warp * ROWS * D;
    const float scale = a.scale * LOG2_E;

    float dq[STRIPS][D / 8][4] = {};
    float lse[STRIPS][2], minus_dot[STRIPS][2];
#pragma unroll
    for (int m = 0; m < STRIPS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 at = blockIdx.y * a.seq + min(warp_query + m * 16 + mma_row(lane, 2 * h), seq - 1);
            lse[m][h] = a.lse[at] * LOG2_E;
            minus_dot[m][h] = -a.dot[at];
        }
    u32 qa[STRIPS][D / 16][4], ga[STRIPS][D / 16][4];

    copy_tile<D, QUERIES, THREADS>(q_tile, q, stride, first_query, seq);
    copy_tile<D, QUERIES, THREADS>(g_tile, g, part, first_query, seq);
    copy_tile<D, KEYS, THREADS>(k_tile[0], k, kv_stride, 0, seq);
    copy_tile<D, KEYS, THREADS>(v_tile[0], v, kv_stride, 0, seq);
    cp_commit();
    for (int j = 0; j < tiles; j++) {
        // After the barrier tile j is there for all warps, and none reads tile j-1 any more.
        cp_wait<0>();
        __syncthreads();
        if (j + 1 < tiles) {
            copy_tile<D, KEYS, THREADS>(k_tile[(j + 1) & 1], k, kv_stride, (j + 1) * KEYS, seq);
            copy_tile<D, KEYS, THREADS>(v_tile[(j + 1) & 1], v, kv_stride, (j + 1) * KEYS, seq);
            cp_commit();
        }
        if (j == 0) {
#pragma unroll
            for (int m = 0; m < STRIPS; m++) {
                load_rows<D>(qa[m], my_q + m * 16 * D, at_a);
                load_rows<D>(ga[m], my_g + m * 16 * D, at_a);
            }
        }
        const u16* kt = k_tile[j & 1];
        const u16* vt = v_tile[j & 1];
        const int first_key = j * KEYS;
        if (warp_query >= seq || (a.causal && first_key >= warp_query + ROWS)) continue;

#pragma unroll
        for (int step = 0; step < KEYS; step += 16) {
            const int key = first_key + step;
            float p[STRIPS][2][4] = {}, ds[STRIPS][2][4];
#pragma unroll
            for (int m = 0; m < STRIPS; m++)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) ds[m][n][i] = minus_dot[m][i >> 1];
            add_dots<D, STRIPS>(p, qa, kt + step * D, at_b);
            add_dots<D, STRIPS>(ds, ga, vt + step * D, at_b);
#pragma unroll
            for (int m = 0; m < STRIPS; m++)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) ds[m][n][i] *= exp2_fast(p[m][n][i] * scale - lse[m][i >> 1]);
            // Only tiles on the diagonal and the last one have keys to hide.
            if (key + 16 > seq || (a.causal && key + 15 > warp_query)) {
#pragma unroll
                for (int m = 0; m < STRIPS; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int end = a.causal ? min(warp_query + m * 16 + mma_row(lane, i) + 1, seq) : seq;
#pragma unroll
                        for (int n = 0; n < 2; n++)
                            ds[m][n][i] = key + n * 8 + mma_column(lane, i) < end ? ds[m][n][i] : 0.f;
                    }
            }
            add_product<D, STRIPS>(dq, ds, kt + step * D, at_a);
        }
    }
    if (warp_query >= seq) return;
#pragma unroll
    for (int m = 0; m < STRIPS; m++)
        store_rows<D>(dq[m], a.scale, a.scale, my_q + m * 16 * D, d_queries(a) + start, stride, warp_query + m * 16,
                      seq);
}
