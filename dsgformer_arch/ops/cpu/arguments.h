// What the entry points take; binding.py mirrors these structures.
#pragma once

#include <cstdint>

extern "C" {

// One image, of type T, and one block's parameters, of float whatever T is; binding.py mirrors this.
struct Dsga {
  int64_t height, width, channels, heads, gate, score, thresholds;
  const void* x;             // (height, width, C)
  void* y;                   // (height, width, C)
  const float* norm_weight;  // (C,)
  const float* norm_bias;    // (C,)
  const float* project_in;   // (4C, C)
  const float* depthwise;    // (4C, 9)
  const float* project_out;  // (C, C)
  const float* temperature;  // (heads,)
  const float* weights;      // W_n, (thresholds,)
  const int64_t* top_k;      // k_n, (thresholds,)
  const float* mask;         // M, (C, 8, 5); for gate DFGB
};

// One image and one step outside the levels; images of type T where no other stands.
struct Step {
  int64_t height, width;  // of the coarser image
  int64_t fine, coarse;   // channels of the finer and of the coarser image; head and tail: of x and of y
  const void* x;          // down: (2 height, 2 width, fine); up: (height, width, coarse); else (height, width, fine)
  const float* weight;    // down: (2, coarse, 2 fine); up: (2, 2 fine, coarse);
                          // head: (coarse, 9 fine); tail: (9 coarse, fine), both filled up to whole vectors
  const float* bias;      // down, head, tail: (coarse,)
  const void* skip;       // up: (2 height, 2 width, fine), or null; tail: (height, width, coarse), float
  void* y;                // up: (2 height, 2 width, fine); else (height, width, coarse), for the tail float
};
}
