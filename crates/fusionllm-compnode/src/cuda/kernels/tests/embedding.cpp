#include "check.h"
#include "../embedding.cu"
#include <map>

template <class T> void test(u32 batch, u32 seq, u32 dim) {
    u32 rows = batch * seq, vocab = 11;
    Tensor<T> table((size_t)vocab * dim, 2.f), out((size_t)rows * dim), dy((size_t)rows * dim, 2.f),
        positions((size_t)seq * dim, 2.f);
    Tensor<int> ids(rows);
    std::map<u32, std::vector<u32>> by_id;
    for (u32 r = 0; r < rows; r++) {
        u32 id = r % 3 ? random_below(vocab) : 5;
        ids.set(r, id);
        by_id[id].push_back(r);
    }
    RUN(embedding, T, rows, 1, table.data(), ids.data(), out.data(), rows, dim);
    compare(
        named<T>("embedding"), out, [&](size_t i) { return table.at((size_t)ids.at(i / dim) * dim + i % dim); }, 0.);

    Tensor<u32> order(rows), starts(by_id.size() + 1), distinct(by_id.size());
    u32 u = 0, k = 0;
    for (auto& [id, which] : by_id) {
        starts.set(u, k);
        distinct.set(u++, id);
        for (u32 r : which) order.set(k++, r);
    }
    starts.set(u, k);
    Tensor<float> grad((size_t)vocab * dim, 1.f), before = grad.copy();
    RUN(embedding_grad, T, u, 1, dy.data(), order.data(), starts.data(), distinct.data(), grad.data(), dim);
    compare(
        named<T>("embedding_grad"), grad,
        [&](size_t i) {
            double sum = before.at(i);
            for (u32 r : by_id[i / dim]) sum += dy.at((size_t)r * dim + i % dim);
            return sum;
        },
        1e-5);

    RUN(position, T, rows, 1, dy.data(), positions.data(), out.data(), rows, seq, dim);
    compare(
        named<T>("position"), out, [&](size_t i) { return dy.at(i) + positions.at(i % ((size_t)seq * dim)); },
        bound<T>(1e-6));

    Tensor<float> pgrad((size_t)seq * dim, 1.f), pbefore = pgrad.copy();
    RUN(position_grad, T, seq, 1, dy.data(), pgrad.data(), batch, seq, dim);
    compare(
        named<T>("position_grad"), pgrad,
        [&](size_t i) {
            double sum = pbefore.at(i);
            for (u32 b = 0; b < batch; b++) sum += dy.at((size_t)b * seq * dim + i);
            return sum;
        },
        1e-5);
}
int main() {
    for (u32 dim : {1u, 7u, 32u, 129u, 768u, 1100u}) {
        test<float>(3, 5, dim);
        test<u16>(3, 5, dim);
    }
    test<float>(19, 4, 16);
    test<u16>(19, 4, 16);
    test<u16>(1, 1, 8);
    return report();
}
