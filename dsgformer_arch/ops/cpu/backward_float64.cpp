// Training in float64, to check the other types by, see backward.h.

#include "backward.h"

extern "C" {
int train_forward_float64(const Training* call) { return enter<D8, D8, double, Forward>(call, call->channels); }
int train_backward_float64(const Training* call) { return enter<D8, D8, double, Backward>(call, call->channels); }
int train_convolve_float64(const Step* call) { return enter<D8, D8, double, Convolve>(call, call->a_width); }
int train_correlate_float64(const Step* call) { return enter<D8, D8, double, Correlate>(call, call->a_width); }
}
