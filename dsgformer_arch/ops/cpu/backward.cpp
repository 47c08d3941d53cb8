// Training in float32 and bfloat16, see backward.h.

#include "backward.h"

extern "C" {
int train_forward_float32(const Training* call) { return enter<F16, F8, float, Forward>(call, call->channels); }
int train_backward_float32(const Training* call) { return enter<F16, F8, float, Backward>(call, call->channels); }
int train_convolve_float32(const Step* call) { return enter<F16, F8, float, Convolve>(call, call->a_width); }
int train_correlate_float32(const Step* call) { return enter<F16, F8, float, Correlate>(call, call->a_width); }
int train_forward_bfloat16(const Training* call) { return enter<F16, F8, bf16, Forward>(call, call->channels); }
int train_backward_bfloat16(const Training* call) { return enter<F16, F8, bf16, Backward>(call, call->channels); }
int train_convolve_bfloat16(const Step* call) { return enter<F16, F8, bf16, Convolve>(call, call->a_width); }
int train_correlate_bfloat16(const Step* call) { return enter<F16, F8, bf16, Correlate>(call, call->a_width); }
}
