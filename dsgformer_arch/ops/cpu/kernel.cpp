// The block DSGA on a CPU, float32 or bfloat16, without gradients: the arithmetic of `in_strips` in ops/eager.py with
// the paper's switches; and steps outside the levels.
//
// An image is cut into columns of tiles, 8 rows high, that a thread walks down.
// Nothing wider than the image's C channels leaves the cache: of a tile, LN,
// the pointwise product, the depthwise convolution, DFGB, GELU and the gate
// follow each other in buffers of a few hundred kilobytes.  Matrix products
// are oneDNN's small ones ("brgemm"), which PyTorch exports; everything else
// is written on vectors of 16 channels.
//
// Compiled on demand by build.py.

#include "block.h"
#include "resampling.h"

using namespace dsgformer;

namespace {

template <class Call>
Result guarded(const Call& call) {
  try {
    call();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (...) {
    return NO_PRODUCT;
  }
}

template <class T>
Result checked(const Dsga* d) {
  for (const void* given : {d->x, static_cast<const void*>(d->y)})
    if (!given) return BAD_ARGUMENT;
  for (const float* given : {d->norm_weight, d->norm_bias, d->project_in, d->depthwise, d->project_out, d->temperature,
                             d->step, d->mask})
    if (!given) return BAD_ARGUMENT;
  if (d->height < 1 || d->width < 1 || d->heads < 1 || d->channels < 1 || d->channels % (LANES * d->heads) ||
      d->thresholds < 1 || !d->top_k)
    return BAD_ARGUMENT;
  return guarded([&] { block<T>(*d); });
}

bool complete(const Step* s) { return s->x && s->y && s->weight && s->height > 0 && s->width > 0; }

template <class T>
Result checked_up(const Step* s) {
  if (!complete(s) || s->fine < 1 || s->coarse < 1 || 2 * s->fine % LANES || s->coarse % LANES) return BAD_ARGUMENT;
  return guarded([&] { upsample<T>(*s); });
}

template <class T>
Result checked_down(const Step* s) {
  if (!complete(s) || !s->bias || s->fine < 1 || s->coarse < 1 || 2 * s->fine % LANES || s->coarse % LANES)
    return BAD_ARGUMENT;
  return guarded([&] { downsample<T>(*s); });
}

template <class T>
Result checked_tail(const Step* s) {
  if (!complete(s) || !s->bias || !s->skip || s->coarse != 3 || s->fine < 1 || s->fine % LANES) return BAD_ARGUMENT;
  return guarded([&] { tail<T>(*s); });
}

}  // namespace

extern "C" {
int dsga_float32(const Dsga* d) { return checked<float>(d); }
int dsga_bfloat16(const Dsga* d) { return checked<bf16>(d); }
int up_float32(const Step* s) { return checked_up<float>(s); }
int up_bfloat16(const Step* s) { return checked_up<bf16>(s); }
int down_float32(const Step* s) { return checked_down<float>(s); }
int down_bfloat16(const Step* s) { return checked_down<bf16>(s); }
int tail_float32(const Step* s) { return checked_tail<float>(s); }
int tail_bfloat16(const Step* s) { return checked_tail<bf16>(s); }
}
