// The block DSGA on a CPU, float32 or bfloat16, without gradients: the arithmetic of `in_strips` in ops/eager.py;
// and the steps outside the levels, those of ops/resampling.py.
//
// An image is cut into columns of tiles, 8 rows high, that a thread walks down.
// Nothing wider than the image's C channels leaves the cache: of a tile, LN,
// the pointwise product, the depthwise convolution, DFGB, GELU and the gate
// follow each other in buffers of a few hundred kilobytes.  Matrix products
// are oneDNN's small ones ("brgemm"), which PyTorch exports; everything else
// is written on vectors of 16 channels.
//
// Compiled on demand by build.py.  One entry point a type, dsga_float32 and dsga_bfloat16, returns 0, or 1 if
// PyTorch has no such matrix product for this processor; likewise head_, down_, up_ and tail_.

#include "block.h"
#include "resampling.h"

using namespace dsgformer;

extern "C" {
int tail_float32(const Step* s) { return !tail<float>(*s); }
int tail_bfloat16(const Step* s) { return !tail<bf16>(*s); }
int head_float32(const Step* s) { return !head<float>(*s); }
int head_bfloat16(const Step* s) { return !head<bf16>(*s); }
int down_float32(const Step* s) { return !downsample<float>(*s); }
int down_bfloat16(const Step* s) { return !downsample<bf16>(*s); }
int up_float32(const Step* s) { return !upsample<float>(*s); }
int up_bfloat16(const Step* s) { return !upsample<bf16>(*s); }
int dsga_float32(const Dsga* d) { return !block<float>(*d); }
int dsga_bfloat16(const Dsga* d) { return !block<bf16>(*d); }
}
