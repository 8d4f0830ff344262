// Holds the attention kernels, run by the emulator, against double precision:
//   g++ -std=c++17 -O2 -DEMU -o /tmp/attention tests/attention.cpp && EMU_SEED=1 /tmp/attention
// An argument (32, 64 or 128) runs that head dim only.
#include "../attention.cu"
#include "../attention_grad.cu"
#include "../grouped_attention.cu"
#include "../grouped_attention_grad.cu"

static int failures = 0;
static u32 random_state = 1;
static float random_value(float range) {
    random_state = random_state * 1664525u + 1013904223u;
    return ((float)(random_state >> 9) / (float)(1 << 22) - 1.f) * range;
}
// A tensor with bytes of NaN on both sides: reading them shows in the results, writing them in `intact`.
template <class T> struct Guarded {
    static constexpr size_t MARGIN = 4096;
    std::vector<char> bytes;
    size_t count;
    char* start;
    explicit Guarded(size_t count) : bytes(count * sizeof(T) + 2 * MARGIN + 256, (char)0xff), count(count) {
        start = (char*)(((uintptr_t)bytes.data() + MARGIN + 255) & ~(uintptr_t)255);
    }
    T* data() { return (T*)start; }
    T& operator[](size_t i) { return data()[i]; }
    bool intact() const {
        for (const char* p = bytes.data(); p < bytes.data() + bytes.size(); p++)
            if ((p < start || p >= start + count * sizeof(T)) && *p != (char)0xff) return false;
        return true;
    }
};
// The worst |value - reference| of a tensor, alone and as a share of what rounding explains.
struct Error {
    double absolute = 0, share = 0, largest = 0;
    void add(double value, double reference, double bound) {
        double difference = std::fabs(value - reference);
        if (!(difference <= 1e30)) difference = 1e30;
        absolute = std::max(absolute, difference);
        share = std::max(share, difference / bound);
        largest = std::max(largest, std::fabs(reference));
    }
    void print(const char* name) {
        printf(" %s %.1e/%.2g (%.0f%%)%s", name, absolute, largest, 100 * share, share <= 1 ? "" : " TOO LARGE");
        failures += !(share <= 1);
    }
};

template <int D> struct Kernels;
#define KERNELS_OF(D)                                                                             \
    template <> struct Kernels<D> {                                                               \
        static constexpr auto attention = emu_attention_bf16_d##D;                                \
        static constexpr auto dot = emu_attention_dot_bf16_d##D;                                  \
        static constexpr auto kv_grad = emu_attention_kv_grad_bf16_d##D;                          \
        static constexpr auto q_grad = emu_attention_q_grad_bf16_d##D;                            \
        static constexpr auto grouped_attention = emu_grouped_attention_bf16_d##D;                \
        static constexpr auto grouped_dot = emu_grouped_attention_dot_bf16_d##D;                  \
        static constexpr auto grouped_kv_grad = emu_grouped_attention_kv_grad_bf16_d##D;          \
        static constexpr auto grouped_q_grad = emu_grouped_attention_q_grad_bf16_d##D;            \
    };
KERNELS_OF(32)
KERNELS_OF(64)
KERNELS_OF(128)

// bf16 keeps 8 bits: rounding changes a value by at most 2^-8 of it. Probabilities and their gradients are rounded
// before they are summed over, and each result once.
constexpr double ROUNDING = 1.0 / 256, SINGLE = 2e-5;

// Values of q, k and v are drawn from -range..range; `shift` is added to q and taken from k, which makes all scores
// negative.
template <int D> void check(int batch, int seq, int heads, bool causal, float range, float shift = 0) {
    const size_t tokens = (size_t)batch * seq;
    const float scale = 1.f / std::sqrt((float)D);
    const size_t count = tokens * heads * D;
    Guarded<u16> qkv(3 * count), out(count), bare(count), d_out(count), d_qkv(3 * count);
    Guarded<float> lse(tokens * heads), dot(tokens * heads);
    for (size_t i = 0; i < qkv.count; i++) {
        size_t part = i / ((size_t)heads * D) % 3;
        qkv[i] = to_bf16(random_value(range) + (part == 0 ? shift : part == 1 ? -shift : 0));
    }
    for (size_t i = 0; i < d_out.count; i++) d_out[i] = to_bf16(random_value(1));

    const unsigned pairs = batch * heads;
    auto blocks = [](size_t n, size_t tile) { return (unsigned)((n + tile - 1) / tile); };
    attention_args<u16> forward{qkv.data(), out.data(), lse.data(), (u32)batch, (u32)seq, (u32)heads, causal, scale};
    Kernels<D>::attention(&forward, blocks(seq, 64), pairs, 1);
    forward.out = bare.data();
    forward.lse = nullptr;
    Kernels<D>::attention(&forward, blocks(seq, 64), pairs, 1);
    bool same = !memcmp(out.data(), bare.data(), out.count * 2);
    attention_dot_args<u16> products{out.data(), d_out.data(), dot.data(), (u32)batch, (u32)seq, (u32)heads};
    Kernels<D>::dot(&products, blocks(d_out.count, 1024), 1, 1);
    attention_grad_args<u16> backward{qkv.data(), d_out.data(), lse.data(), dot.data(), d_qkv.data(),
                                      (u32)batch, (u32)seq,     (u32)heads, causal,     scale};
    Kernels<D>::kv_grad(&backward, blocks(seq, 64), pairs, 1);
    Kernels<D>::q_grad(&backward, blocks(seq, 64), pairs, 1);

    Error errors[6];
    std::vector<double> p(seq), dp(seq), sums(3 * (size_t)seq * D), sizes(3 * (size_t)seq * D);
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            auto in = [&](int s, int part, int c) {
                return (double)from_bf16(qkv[(((size_t)(b * seq + s) * 3 + part) * heads + h) * D + c]);
            };
            auto row = [&](int s, int c) { return ((size_t)(b * seq + s) * heads + h) * D + c; };
            std::fill(sums.begin(), sums.end(), 0.0);
            std::fill(sizes.begin(), sizes.end(), 0.0);
            auto add = [&](int part, int s, int c, double v, double single) {
                sums[((size_t)part * seq + s) * D + c] += v;
                sizes[((size_t)part * seq + s) * D + c] += std::fabs(v) + single / ROUNDING;
            };
            for (int i = 0; i < seq; i++) {
                const int keys = causal ? i + 1 : seq;
                double top = -1e300, sum = 0, product = 0, product_size = 0;
                for (int j = 0; j < keys; j++) {
                    p[j] = 0;
                    for (int c = 0; c < D; c++) p[j] += in(i, 0, c) * in(j, 1, c);
                    p[j] *= scale;
                    top = std::max(top, p[j]);
                }
                for (int j = 0; j < keys; j++) sum += p[j] = std::exp(p[j] - top);
                double log_sum = top + std::log(sum);
                errors[1].add(lse[((size_t)b * heads + h) * seq + i], log_sum, SINGLE * (1 + std::fabs(top)));
                for (int j = 0; j < keys; j++) p[j] /= sum;
                for (int c = 0; c < D; c++) {
                    double value = 0, size = 0;
                    for (int j = 0; j < keys; j++) {
                        value += p[j] * in(j, 2, c);
                        size += p[j] * std::fabs(in(j, 2, c));
                    }
                    double o = from_bf16(out[row(i, c)]), g = from_bf16(d_out[row(i, c)]);
                    errors[0].add(o, value, ROUNDING * (size + std::fabs(value)) + SINGLE);
                    product += o * g;
                    product_size += std::fabs(o * g);
                }
                errors[2].add(dot[((size_t)b * heads + h) * seq + i], product, SINGLE * (product_size + 1e-3));
                for (int j = 0; j < keys; j++) {
                    // The difference may be small beside what it is the difference of, which f32 rounds.
                    double d = -product, d_size = product_size;
                    for (int c = 0; c < D; c++) {
                        double term = from_bf16(d_out[row(i, c)]) * in(j, 2, c);
                        d += term;
                        d_size += std::fabs(term);
                    }
                    const double ds = p[j] * d * scale, single = p[j] * d_size * scale * 1e-7;
                    for (int c = 0; c < D; c++) {
                        add(0, i, c, ds * in(j, 1, c), single * std::fabs(in(j, 1, c)));
                        add(1, j, c, ds * in(i, 0, c), single * std::fabs(in(i, 0, c)));
                        add(2, j, c, p[j] * from_bf16(d_out[row(i, c)]), 0);
                    }
                }
            }
            for (int part = 0; part < 3; part++)
                for (int s = 0; s < seq; s++)
                    for (int c = 0; c < D; c++) {
                        size_t at = ((size_t)part * seq + s) * D + c;
                        double value = from_bf16(d_qkv[(((size_t)(b * seq + s) * 3 + part) * heads + h) * D + c]);
                        double bound = (ROUNDING + 4 * SINGLE) * (sizes[at] + std::fabs(sums[at])) + SINGLE;
                        errors[3 + part].add(value, sums[at], bound);
                    }
        }
    printf("d%-3d seq %3d %s x%g%+g:", D, seq, causal ? "causal" : "full  ", range, -shift);
    const char* names[] = {"out", "lse", "dot", "dQ", "dK", "dV"};
    for (int i = 0; i < 6; i++) errors[i].print(names[i]);
    bool intact = qkv.intact() && out.intact() && bare.intact() && d_out.intact() && d_qkv.intact() && lse.intact() &&
                  dot.intact();
    if (!same) printf(" OUTPUT DIFFERS WITHOUT LSE");
    if (!intact) printf(" WRITES OUTSIDE");
    failures += !same + !intact;
    printf("\n");
}

// The grouped form gives the same bits as the packed one over repeated heads of keys and values, but for the gradients
// of keys and values, which are sums over the heads that one serves.
template <int D> void check_grouped(int batch, int seq, int kv_heads, int served, bool causal) {
    const int heads = kv_heads * served;
    const size_t tokens = (size_t)batch * seq, count = tokens * heads * D, kv_count = tokens * kv_heads * D;
    const float scale = 1.f / std::sqrt((float)D);
    Guarded<u16> qkv(3 * count), packed_out(count), d_out(count), d_qkv(3 * count);
    Guarded<u16> q(count), k(kv_count), v(kv_count), out(count), d_q(count), d_k(kv_count), d_v(kv_count);
    Guarded<float> packed_lse(tokens * heads), lse(tokens * heads), dot(tokens * heads), packed_dot(tokens * heads);
    for (auto* t : {&q, &k, &v, &d_out})
        for (size_t i = 0; i < t->count; i++) (*t)[i] = to_bf16(random_value(2));
    for (size_t s = 0; s < tokens; s++)
        for (int h = 0; h < heads; h++)
            for (int c = 0; c < D; c++) {
                const size_t kv = (s * kv_heads + h / served) * D + c, at = (s * 3 * heads + h) * D + c;
                qkv[at] = q[(s * heads + h) * D + c];
                qkv[at + (size_t)heads * D] = k[kv];
                qkv[at + (size_t)2 * heads * D] = v[kv];
            }
    const unsigned tiles = (seq + 63) / 64, dots = (unsigned)((count + 1023) / 1024);
    const u32 b = (u32)batch, s = (u32)seq, h = (u32)heads, g = (u32)kv_heads;
    attention_args<u16> packed{qkv.data(), packed_out.data(), packed_lse.data(), b, s, h, causal, scale};
    Kernels<D>::attention(&packed, tiles, b * h, 1);
    attention_dot_args<u16> packed_dots{packed_out.data(), d_out.data(), packed_dot.data(), b, s, h};
    Kernels<D>::dot(&packed_dots, dots, 1, 1);
    attention_grad_args<u16> packed_grad{qkv.data(),        d_out.data(), packed_lse.data(), packed_dot.data(),
                                         d_qkv.data(), b, s, h, causal, scale};
    Kernels<D>::kv_grad(&packed_grad, tiles, b * h, 1);
    Kernels<D>::q_grad(&packed_grad, tiles, b * h, 1);

    grouped_attention_args<u16> forward{q.data(), k.data(), v.data(), out.data(), lse.data(), b, s, h, g, causal, scale};
    Kernels<D>::grouped_attention(&forward, tiles, b * h, 1);
    attention_dot_args<u16> products{out.data(), d_out.data(), dot.data(), b, s, h};
    Kernels<D>::grouped_dot(&products, dots, 1, 1);
    grouped_attention_grad_args<u16> backward{q.data(),   k.data(),   v.data(),   d_out.data(), lse.data(), dot.data(),
                                              d_q.data(), d_k.data(), d_v.data(), b, s, h, g, causal, scale};
    Kernels<D>::grouped_kv_grad(&backward, tiles, b * g, 1);
    Kernels<D>::grouped_q_grad(&backward, tiles, b * h, 1);

    bool same = !memcmp(out.data(), packed_out.data(), count * 2) &&
                !memcmp(lse.data(), packed_lse.data(), lse.count * 4) &&
                !memcmp(dot.data(), packed_dot.data(), dot.count * 4);
    Error errors[2];
    for (size_t t = 0; t < tokens; t++)
        for (int j = 0; j < heads; j++)
            same &= !memcmp(&d_q[(t * heads + j) * D], &d_qkv[(t * 3 * heads + j) * D], D * 2);
    for (int part = 0; part < 2; part++)
        for (size_t t = 0; t < tokens; t++)
            for (int j = 0; j < kv_heads; j++)
                for (int c = 0; c < D; c++) {
                    double sum = 0, size = 0;
                    for (int m = 0; m < served; m++) {
                        double v = from_bf16(d_qkv[((t * 3 + 1 + part) * heads + j * served + m) * D + c]);
                        sum += v;
                        size += std::fabs(v);
                    }
                    double got = from_bf16((part ? d_v : d_k)[(t * kv_heads + j) * D + c]);
                    errors[part].add(got, sum, ROUNDING * (size + std::fabs(sum)) + SINGLE);
                }
    printf("grouped d%-3d seq %3d, %d x %d heads %s:", D, seq, kv_heads, served, causal ? "causal" : "full  ");
    errors[0].print("dK");
    errors[1].print("dV");
    bool intact = out.intact() && lse.intact() && dot.intact() && d_q.intact() && d_k.intact() && d_v.intact();
    if (!same) printf(" OTHERWISE THAN PACKED");
    if (!intact) printf(" WRITES OUTSIDE");
    failures += !same + !intact;
    printf("\n");
}

template <int D> void check_all() {
    for (int seq : {1, 65, 200})
        for (bool causal : {true, false}) {
            check_grouped<D>(2, seq, 2, 3, causal);
            check_grouped<D>(1, seq, 3, 1, causal);
        }
    for (int seq : {1, 7, 64, 65, 192, 200})
        for (bool causal : {true, false}) check<D>(2, seq, 2, causal, 2);
    check<D>(1, 130, 3, true, 12);  // scores of some tens: most probabilities vanish
    for (bool causal : {true, false}) check<D>(1, 70, 1, causal, 1, 8);  // e^-lse is past what f32 holds
}

int main(int count, char** arguments) {
    int only = count > 1 ? atoi(arguments[1]) : 0;
    if (!only || only == 32) check_all<32>();
    if (!only || only == 64) check_all<64>();
    if (!only || only == 128) check_all<128>();
    printf(failures ? "%d failures\n" : "all right\n", failures);
    return failures != 0;
}
