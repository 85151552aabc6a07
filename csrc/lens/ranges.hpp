// Where the vocabulary is cut for threads to share.
#pragma once

#include <algorithm>
#include <cstdint>

namespace refinelens {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// At most `most` ranges of whole blocks, the same for any number of threads.
struct Ranges {
  int64_t vocab_size, block, n_blocks, count;

  Ranges(int64_t vocab_size, int64_t block, int64_t most)
      : vocab_size(vocab_size), block(block), n_blocks((vocab_size + block - 1) / block),
        count(std::min(n_blocks, most)) {}
  int64_t start(int64_t i) const { return std::min(n_blocks * i / count * block, vocab_size); }
};

}  // namespace refinelens
