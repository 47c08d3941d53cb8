// PyTorch's bfloat16, as its functions name it.
#pragma once

#include <cstdint>

namespace c10 {
struct alignas(2) BFloat16 {
  uint16_t x;
};
}  // namespace c10
