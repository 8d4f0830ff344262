#include "check.h"
#include "../squares.cu"

void test(u32 chunks, std::vector<u32> ends) {
    Tensor<float> x((size_t)chunks * 1024, 3.f);
    Tensor<double> partial(chunks), sums(ends.size());
    Tensor<u32> starts(ends.size() + 1);
    starts.set(0, 0);
    for (size_t i = 0; i < ends.size(); i++) starts.set(i + 1, ends[i]);
    RUN_PLAIN(chunk_squares, (chunks + 7) / 8, 1, x.data(), partial.data(), chunks);
    auto squares = [&](size_t from, size_t to) {
        double sum = 0;
        for (size_t i = from * 1024; i < to * 1024; i++) sum += x.at(i) * x.at(i);
        return sum;
    };
    compare("chunk_squares", partial, [&](size_t i) { return squares(i, i + 1); }, 1e-6);
    RUN_PLAIN(segment_sums, (u32)ends.size(), 1, partial.data(), starts.data(), sums.data());
    compare("segment_sums", sums, [&](size_t i) { return squares(i ? ends[i - 1] : 0, ends[i]); }, 1e-6);
}
int main() {
    test(1, {1});
    test(13, {1, 2, 9, 13});
    test(600, {300, 600});
    return report();
}
