#include "check.h"
#include "../inputs.h"
namespace forward {
#include "../attention32.cu"
#include "../grouped_attention32.cu"
}
namespace backward {
#include "../attention32_grad.cu"
#include "../grouped_attention32_grad.cu"
}

// Values of q, k and v are drawn from -range..range; `shift` is added to q and taken from k, which makes all scores
// negative. Errors are shares of the sum of |terms|; with large scores, times the sum of |terms| of a score, which f32
// holds only to its last bits, so that e to its power is off by as much.
static void test(u32 batch, u32 seq, u32 heads, bool causal, float range, float shift = 0.f) {
    constexpr int D = 64;
    const bool large = range > 2.f || shift != 0.f;
    auto hold = [&](const char* name, double got, double wanted, double size) {
        const double error = fabs(got - wanted) / (size + 1e-30);
        note(std::string("attention_f32 ") + name + (large ? ", large scores" : ""), error, large ? 1e-6 : 5e-6);
    };
    const size_t tokens = (size_t)batch * seq, count = tokens * heads * D;
    const float scale = 0.125f;
    const u32 pairs = batch * heads, rows = blocks(seq, 64);
    Tensor<float> qkv(3 * count, range), out(count), bare(count), d_out(count, 1.f), d_qkv(3 * count);
    Tensor<float> lse(tokens * heads), dot(tokens * heads), d_again(3 * count);
    for (size_t i = 0; i < qkv.count; i++) {
        const size_t part = i / ((size_t)heads * D) % 3;
        qkv.set(i, qkv.at(i) + (part == 0 ? shift : part == 1 ? -shift : 0.f));
    }
    const Tensor<float> qkv_before = qkv.copy(), d_out_before = d_out.copy();
    {
        forward::attention_f32_d64_args args{qkv.data(), out.data(), lse.data(), batch, seq, heads, causal, scale};
        forward::emu_attention_f32_d64(&args, rows, pairs, 1);
        args.out = bare.data();
        args.lse = nullptr;
        forward::emu_attention_f32_d64(&args, rows, pairs, 1);
    }
    {
        backward::attention_dot_f32_d64_args args{out.data(), d_out.data(), dot.data(), batch, seq, heads};
        backward::emu_attention_dot_f32_d64(&args, blocks(count, 1024), 1, 1);
    }
    for (Tensor<float>* to : {&d_qkv, &d_again}) {
        attention_grad_args<float> args{qkv.data(), d_out.data(), lse.data(), dot.data(), to->data(),
                                        batch,      seq,          heads,      causal,     scale};
        backward::emu_attention_kv_grad_f32_d64(&args, rows, pairs, 1);
        backward::emu_attention_q_grad_f32_d64(&args, rows, pairs, 1);
    }
    bool same = !memcmp(out.data(), bare.data(), count * 4) && !memcmp(d_qkv.data(), d_again.data(), 3 * count * 4) &&
                !memcmp(qkv.data(), qkv_before.data(), 3 * count * 4) &&
                !memcmp(d_out.data(), d_out_before.data(), count * 4);
    for (const Tensor<float>* t : {&qkv, &out, &bare, &d_out, &d_qkv, &lse, &dot, &d_again}) same &= t->whole();
    note("attention_f32 repeated, writes inside", same ? 0. : 1., 0.);

    // Sums of d_q, d_k and d_v, and of the sizes of their terms.
    std::vector<double> p(seq), sums(3 * (size_t)seq * D), sizes(3 * (size_t)seq * D);
    for (u32 b = 0; b < batch; b++)
        for (u32 h = 0; h < heads; h++) {
            auto in = [&](u32 s, u32 part) { return (((size_t)(b * seq + s) * 3 + part) * heads + h) * D; };
            std::fill(sums.begin(), sums.end(), 0.);
            std::fill(sizes.begin(), sizes.end(), 0.);
            for (u32 i = 0; i < seq; i++) {
                const u32 keys = causal ? i + 1 : seq;
                const size_t row = ((size_t)(b * seq + i) * heads + h) * D, head = ((size_t)b * heads + h) * seq + i;
                const float *q = qkv.data() + in(i, 0), *g = d_out.data() + row, *o = out.data() + row;
                double top = -1e300, sum = 0, score_size = 1;
                for (u32 j = 0; j < keys; j++) {
                    double size = 0;
                    p[j] = 0;
                    for (int c = 0; c < D; c++) {
                        const double term = (double)q[c] * qkv.data()[in(j, 1) + c] * scale;
                        p[j] += term;
                        size += fabs(term);
                    }
                    if (large) score_size = std::max(score_size, size);
                    top = std::max(top, p[j]);
                }
                for (u32 j = 0; j < keys; j++) sum += p[j] = exp(p[j] - top);
                for (u32 j = 0; j < keys; j++) p[j] /= sum;
                hold("lse", lse.at(head), top + log(sum), score_size);
                double product = 0, product_size = 0;
                for (int c = 0; c < D; c++) {
                    double value = 0, size = 0;
                    for (u32 j = 0; j < keys; j++) {
                        const double term = p[j] * qkv.data()[in(j, 2) + c];
                        value += term;
                        size += fabs(term);
                    }
                    hold("out", o[c], value, size * score_size);
                    product += (double)o[c] * g[c];
                    product_size += fabs((double)o[c] * g[c]);
                }
                hold("dot", dot.at(head), product, product_size);
                for (u32 j = 0; j < keys; j++) {
                    const float *k = qkv.data() + in(j, 1), *v = qkv.data() + in(j, 2);
                    double d = -product, d_size = product_size;
                    for (int c = 0; c < D; c++) {
                        d += (double)g[c] * v[c];
                        d_size += fabs((double)g[c] * v[c]);
                    }
                    const double ds = p[j] * d * scale, ds_size = p[j] * (fabs(d) * score_size + d_size) * scale;
                    auto add = [&](int part, u32 s, int c, double value, double size) {
                        sums[((size_t)part * seq + s) * D + c] += value;
                        sizes[((size_t)part * seq + s) * D + c] += size;
                    };
                    for (int c = 0; c < D; c++) {
                        add(0, i, c, ds * k[c], ds_size * fabs(k[c]));
                        add(1, j, c, ds * q[c], ds_size * fabs(q[c]));
                        add(2, j, c, p[j] * g[c], p[j] * fabs(g[c]) * score_size);
                    }
                }
            }
            const char* names[] = {"d_q", "d_k", "d_v"};
            for (u32 part = 0; part < 3; part++)
                for (u32 s = 0; s < seq; s++)
                    for (int c = 0; c < D; c++) {
                        const size_t at = ((size_t)part * seq + s) * D + c;
                        hold(names[part], d_qkv.at(in(s, part) + c), sums[at], sizes[at]);
                    }
        }
}

// The grouped form gives the same bits as the packed one over repeated heads of keys and values, but for the gradients
// of keys and values, which are sums over the heads that one serves.
static void test_grouped(u32 batch, u32 seq, u32 kv_heads, u32 served, bool causal) {
    constexpr int D = 64;
    const u32 heads = kv_heads * served, tiles = blocks(seq, 64);
    const size_t tokens = (size_t)batch * seq, count = tokens * heads * D, kv_count = tokens * kv_heads * D;
    const float scale = 0.125f;
    Tensor<float> q(count, 2.f), k(kv_count, 2.f), v(kv_count, 2.f), d_out(count, 1.f), qkv(3 * count);
    Tensor<float> packed_out(count), packed_lse(tokens * heads), packed_dot(tokens * heads), d_qkv(3 * count);
    Tensor<float> out(count), lse(tokens * heads), dot(tokens * heads), d_q(count), d_k(kv_count), d_v(kv_count);
    for (size_t s = 0; s < tokens; s++)
        for (u32 h = 0; h < heads; h++)
            for (int c = 0; c < D; c++) {
                const size_t kv = (s * kv_heads + h / served) * D + c, at = (s * 3 * heads + h) * D + c;
                qkv.set(at, q.at((s * heads + h) * D + c));
                qkv.set(at + heads * D, k.at(kv));
                qkv.set(at + 2 * heads * D, v.at(kv));
            }
    attention_args<float> packed{qkv.data(), packed_out.data(), packed_lse.data(), batch, seq, heads, causal, scale};
    forward::emu_attention_f32_d64(&packed, tiles, batch * heads, 1);
    attention_dot_args<float> dots{packed_out.data(), d_out.data(), packed_dot.data(), batch, seq, heads};
    backward::emu_attention_dot_f32_d64(&dots, blocks(count, 1024), 1, 1);
    attention_grad_args<float> grad{qkv.data(),   d_out.data(), packed_lse.data(), packed_dot.data(),
                                    d_qkv.data(), batch, seq, heads, causal, scale};
    backward::emu_attention_kv_grad_f32_d64(&grad, tiles, batch * heads, 1);
    backward::emu_attention_q_grad_f32_d64(&grad, tiles, batch * heads, 1);
    grouped_attention_args<float> args{q.data(),   k.data(), v.data(), out.data(), lse.data(), batch,
                                       seq, heads, kv_heads, causal,   scale};
    forward::emu_grouped_attention_f32_d64(&args, tiles, batch * heads, 1);
    dots = {out.data(), d_out.data(), dot.data(), batch, seq, heads};
    backward::emu_grouped_attention_dot_f32_d64(&dots, blocks(count, 1024), 1, 1);
    grouped_attention_grad_args<float> apart{q.data(),   k.data(),   v.data(), d_out.data(), lse.data(),
                                                dot.data(), d_q.data(), d_k.data(), d_v.data(), batch,
                                                seq,        heads,      kv_heads,   causal,     scale};
    backward::emu_grouped_attention_kv_grad_f32_d64(&apart, tiles, batch * kv_heads, 1);
    backward::emu_grouped_attention_q_grad_f32_d64(&apart, tiles, batch * heads, 1);
    bool same = !memcmp(out.data(), packed_out.data(), count * 4) &&
                !memcmp(lse.data(), packed_lse.data(), lse.count * 4);
    for (size_t s = 0; s < tokens; s++)
        for (u32 h = 0; h < heads; h++)
            same &= !memcmp(d_q.data() + (s * heads + h) * D, d_qkv.data() + (s * 3 * heads + h) * D, D * 4);
    for (const Tensor<float>* t : {&out, &lse, &dot, &d_q, &d_k, &d_v}) same &= t->whole();
    note("grouped_attention_f32 as the packed one", same ? 0. : 1., 0.);
    for (int part = 0; part < 2; part++)
        compare(
            part ? "grouped_attention_f32 d_v" : "grouped_attention_f32 d_k", part ? d_v : d_k,
            [&](size_t i) {
                const size_t c = i % D, j = i / D % kv_heads, s = i / D / kv_heads;
                double sum = 0;
                for (u32 m = 0; m < served; m++) sum += d_qkv.at(((s * 3 + 1 + part) * heads + j * served + m) * D + c);
                return sum;
            },
            5e-6);
}

int main() {
    for (u32 seq : {1u, 65u, 200u})
        for (bool causal : {true, false}) {
            test_grouped(2, seq, 2, 3, causal);
            test_grouped(1, seq, 3, 1, causal);
        }
    for (u32 seq : {1u, 7u, 64u, 65u, 192u, 200u})
        for (bool causal : {true, false}) test(2, seq, 2, causal, 2.f);
    test(1, 130, 3, true, 12.f);  // scores of some tens: most probabilities vanish
    for (bool causal : {true, false}) test(1, 70, 1, causal, 1.f, 8.f);  // e^-lse is past what f32 holds
    return report();
}
