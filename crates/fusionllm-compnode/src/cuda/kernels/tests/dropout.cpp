#include "check.h"
#include "../dropout.cu"

// ChaCha8Rng::seed_from_u64(seed) of rand_chacha 0.10: its key (get_seed) and a hash of its first 5000 next_u64, as
// made by
//   h = 0xcbf29ce484222325; for x in 5000 draws { h = (h ^ x).wrapping_mul(0x100000001b3) }
struct Reference {
    u32 key[8];
    u64 first, hash;
};
static const Reference REFERENCES[] = {
    {{4185125612, 1171109249, 1934028935, 2909580550, 3819163856, 1743198003, 1927977970, 4269640407},
     0xb585f767a79a3b6c,
     0xb5683b838d682cae},
    {{1914558698, 1309681245, 4164656265, 779669058, 3657683898, 3268581273, 2891317778, 469460595},
     0x67094cea8ca40db1,
     0x197b72c4ba1f524},
    {{168258197, 1354433943, 1673788840, 1052975288, 175442120, 1602774357, 1206142388, 3974257679},
     0xe423ae5712b7e737,
     0xa4b013e60972602e},
};
static std::vector<u64> draws(const u32* key, u32 count) {
    std::vector<u64> all;
    for (u32 block = 0; all.size() < count; block++) {
        u32 w[16];
        chacha8(w, key, block);
        for (int k = 0; k < 8; k++) all.push_back((u64)w[2 * k + 1] << 32 | w[2 * k]);
    }
    all.resize(count);
    return all;
}
template <class T> void test(u32 n, double p, const Reference& reference) {
    auto stream = draws(reference.key, n);
    u64 threshold = (u64)ceil(p * 9007199254740992.);  // r * 2^-53 < p
    float keep = (float)(1. / (1. - p));
    Tensor<T> x(n, 3.f), z(n, 3.f);
    for (bool with : {false, true}) {
        Tensor<T> source = x.copy(), apart(n), &out = with ? apart : source;
        RUN(dropout, T, blocks(n, 2048), 1, source.data(), with ? z.data() : nullptr, out.data(),
            {reference.key[0], reference.key[1], reference.key[2], reference.key[3], reference.key[4], reference.key[5],
             reference.key[6], reference.key[7]},
            n, (u32)(threshold >> 32), (u32)threshold, keep);
        auto wanted = [&](size_t i) {
            return ((double)(stream[i] >> 11) * ldexp(1., -53) < p ? 0. : x.at(i) * (double)keep) +
                   (with ? z.at(i) : 0.);
        };
        compare(named<T>("dropout") + (with ? " + addend" : " in place"), out, wanted, bound<T>(1e-6));
    }
}
int main() {
    for (auto& r : REFERENCES) {
        auto all = draws(r.key, 5000);
        u64 hash = 0xcbf29ce484222325;
        for (u64 x : all) hash = (hash ^ x) * 0x100000001b3;
        note("chacha8 against rand_chacha", all[0] == r.first && hash == r.hash ? 0 : 1, 0);
        for (u32 n : {1u, 7u, 8u, 2048u, 2049u, 5000u})
            for (double p : {0.1, 0.5}) {
                test<float>(n, p, r);
                test<u16>(n, p, r);
            }
    }
    return report();
}
