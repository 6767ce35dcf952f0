// Compiled into every source of the build that weaken.py makes: each memory order asks whether it is the one to be weakened.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace torchshm {

// TORCHSHM_WEAKEN="site:order", order as its number in std::memory_order.
inline std::memory_order order_at(int site, std::memory_order order) {
  static const struct Weakened {
    int site = -1, order = 0;
    Weakened() {
      if (const char* text = std::getenv("TORCHSHM_WEAKEN")) (void)std::sscanf(text, "%d:%d", &site, &order);
    }
  } weakened;
  return site == weakened.site ? static_cast<std::memory_order>(weakened.order) : order;
}

}  // namespace torchshm
