// What the entry points take; binding.py mirrors these structures and the results.
#pragma once

#include <cstdint>

extern "C" {

enum Result : int {
  DONE = 0,
  NO_PRODUCT = 1,  // oneDNN has no small matrix product of this type for this processor
  NO_MEMORY = 2,
  BAD_ARGUMENT = 3,
};

// One image, of type T, and one block's parameters, of float whatever T is.
struct Dsga {
  int64_t height, width, channels, heads, thresholds;
  const void* x;             // (height, width, C)
  void* y;                   // (height, width, C)
  float* scores;             // A, (heads, C / heads, C / heads); or null
  const float* norm_weight;  // (C,)
  const float* norm_bias;    // (C,)
  const float* project_in;   // (4C, C)
  const float* depthwise;    // (4C, 9)
  const float* project_out;  // (C, C)
  const float* temperature;  // (heads,)
  const float* step;         // W_n, (thresholds,)
  const float* mask;         // M, (C, 8, 5)
  const int64_t* top_k;      // k_n, (thresholds,)
};

// One image and one step outside the levels; images are of type T unless noted.
struct Step {
  int64_t height, width;  // of the coarser image
  int64_t fine, coarse;   // channels of the finer and of the coarser image; tail: of x and of y, 3
  const void* x;          // down: (2 height, 2 width, fine); up: (height, width, coarse); tail: (height, width, fine)
  const float* weight;    // down: (2, coarse, 2 fine); up: (2, 2 fine, coarse); tail: (27 and 5 zeros, fine)
  const float* bias;      // down, tail: (coarse,)
  const void* skip;       // up: (2 height, 2 width, fine), or null; tail: (height, width, 3), float
  void* y;                // up: (2 height, 2 width, fine); else (height, width, coarse), for the tail float
};
}
