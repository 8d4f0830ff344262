#pragma once
#include "inputs.h"

// bf16 attention without a matrix of scores in memory (FlashAttention-2: Dao, arXiv 2307.08691), from sm_80.
//
// Tiles (threads a block: 128; what the launch needs is QUERIES: grid = (ceil(seq / QUERIES), batch * heads)):
//   head dim   QUERIES   KEYS   shared memory
//         32        64     64         20 KB
//         64        64     64         40 KB
//        128        64     32         48 KB

// out = softmax(q k^T * scale) v, a block for QUERIES queries of one head, and the log-sum-exp of each query's scores.
// A warp has STRIPS * 16 queries, whose rows of q stay in registers; all warps go over the same tiles of keys, and the
// next tile is copied while one is computed with. The maximum and the sum of each query are kept over the tiles and the
// output scaled at the end.
template <int D, int KEYS, int STRIPS, class A> DEV void attention(const A& a) {
    constexpr int THREADS = 128, ROWS = 16 * STRIPS, QUERIES = THREADS / 32 * ROWS;
    constexpr float LOG2_E = 1.44269504f;
    __shared__ __align__(128) u16 q_tile[QUERIES * D];
    __shared__ __align__(128) u16 k_tile[2][KEYS * D];
    __shared__ __align__(128) u16 v_tile[2][KEYS * D];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int seq = (int)a.seq, heads = (int)a.heads;
    const int batch = (int)blockIdx.y / heads, head = (int)blockIdx.y % heads;
    // Blocks start in the order of blockIdx.x. With a causal mask the last queries have the most keys: they go first.
    const int first_query = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, warp_query = first_query + warp * ROWS;
    const int keys = a.causal ? min(first_query + QUERIES, seq) : seq, tiles = (keys + KEYS - 1) / KEYS;
    const u32 part = a.heads * D, stride = (A::GROUPED ? 1 : 3) * part;
    const u32 kv_stride = kv_step<D>(a, stride);
    const u16* q = queries(a) + (size_t)batch * seq * stride + (size_t)head * D;
    const u16* k = key_place<D>(a, q + part, (size_t)batch * seq, head);
    const u16* v = value_place<D>(a, k + part, (size_t)batch * seq, head);
    const int at_a = lane_a<D>(lane), at_b = lane_b<D>(lane);
    u16* const my_rows = q_tile + warp * ROWS * D;

    float acc[STRIPS][D / 8][4] = {};
    float top[STRIPS][2], sum[STRIPS][2];
    const float minus_infinity = bits_f32(0xff800000u), scale = a.scale * LOG2_E;
#pragma unroll
    for (int m = 0; m < STRIPS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[m][h] = minus_infinity;
            sum[m][h] = 0.f;
        }
    u32 qa[STRIPS][D / 16][4];

    copy_tile<D, QUERIES, THREADS>(q_tile, q, stride, first_query, seq);
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
        const u16* kt = k_tile[j & 1];
        const u16* vt = v_tile[j & 1];
        if (j == 0) {
#pragma unroll
            for (int m = 0; m < STRIPS; m++)
#pragma unroll
                for (int c = 0; c < D / 16; c++) load_a(qa[m][c], my_rows + m * 16 * D, at_a, c);
        }
        const int first_key = j * KEYS;
        if (warp_query >= seq || (a.causal && first_key >= warp_query + ROWS)) continue;

        float s[STRIPS][KEYS / 8][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; c++)
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 b[4];
                load_b(b, kt + n * 16 * D, at_b, c);
#pragma unroll
                for (int m = 0; m < STRIPS; m++) {
                    mma(s[m][2 * n], qa[m][c], b);
                    mma(s[m][2 * n + 1], qa[m][c], b + 2);
                }
            }
        // Only tiles on the diagonal and the last one have keys to hide.
        if (first_key + KEYS > seq || (a.causal && first_key + KEYS - 1 > warp_query)) {
#pragma unroll
            for (int m = 0; m < STRIPS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int end = a.causal ? min(warp_query + m * 16 + mma_row(lane, i) + 1, seq) : seq;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        s[m][n][i] = first_key + n * 8 + mma_column(lane, i) < end ? s[m][n][i] : minus_infinity;
                }
        }
        // Every query sees key 0, so after the first tile the maximum is a number.
#pragma unroll
        for (int m = 0; m < STRIPS; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float most = top[m][h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) most = fmaxf(most, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                most = fmaxf(most, shfl_xor(most, 1));
                most = fmaxf(most, shfl_xor(most, 2));
                const float offset = most * scale, shrink = exp2_fast(top[m][h] * scale - offset);
                top[m][h] = most;
                float more = 0.f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; i++) {
                        s[m][n][i] = exp2_fast(s[m][n][i] * scale - offset);
                        more += s[m][n][i];
                    }
                sum[m][h] = sum[m][h] * shrink + more;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    acc[m][n][2 * h] *= shrink;
                    acc[m][n][2 * h + 1] *= shrink;
                }
            }
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) {
            u32 p[STRIPS][4];
#pragma unroll
            for (int m = 0; m < STRIPS; m++) accumulators_to_a(p[m], s[m][2 * c], s[m][2 * c + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                load_b_rows(b, vt + c * 16 * D, at_a, n);
#pragma unroll
                for (int m = 0; m < STRIPS; m++) {
                    mma(acc[m][2 * n], p[m], b);
                    mma(acc[m][2 * n + 1], p[m], b + 2);
                }
            }
        }
    }
    if (warp_query >= seq) return;
    u16* out = a.out + ((size_t)batch * seq * heads + head) * D;
#pragma unroll
    for (int m = 0; m < STRIPS; m++) {
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += shfl_xor(total, 1);
            total += shfl_xor(total, 2);
            inverse[h] = 1.f / total;
            int query = warp_query + m * 16 + mma_row(lane, 2 * h);
            if (a.lse && lane % 4 == 0 && query < seq)
                a.lse[blockIdx.y * a.seq + query] = top[m][h] * a.scale + logf(total);
        }
        store_rows<D>(acc[m], inverse[0], inverse[1], my_rows + m * 16 * D, out, part, warp_query + m * 16, seq);
    }
}
