// What the kernels of linear_ablation_loss read, and the one case that the subtraction cannot serve.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace memloc {

struct LinearAblationLossProblem {
  int64_t batch, count, classes;  // count: features of an example
  const double* features;         // [batch, count]
  const double* weight;           // [classes, count]
  const double* bias;             // [classes], or null
  const double* baseline;         // [count] at b * baseline_step
  int64_t baseline_step;
  const double* logits;    // [classes, batch], without the bias
  const int64_t* targets;  // [batch]

  MEMLOC_HOST_DEVICE double baseline_of(int64_t b, int64_t c) const { return baseline[b * baseline_step + c]; }
  MEMLOC_HOST_DEVICE double delta(int64_t b, int64_t c) const { return features[b * count + c] - baseline_of(b, c); }
  MEMLOC_HOST_DEVICE double bias_of(int64_t k) const { return bias != nullptr ? bias[k] : 0; }

  // The logit of class k with feature c at its baseline, summed anew: where the feature is not finite, nor are the
  // logits that it would have to be subtracted from.
  MEMLOC_HOST_DEVICE double replaced_logit(int64_t b, int64_t c, int64_t k) const {
    const double *const w = weight + k * count, *const f = features + b * count;
    double sum = bias_of(k) + w[c] * baseline_of(b, c);
    for (int64_t j = 0; j < count && sum - sum == 0; ++j) {  // what is no longer finite stays so
      if (j != c) sum += w[j] * f[j];
    }
    return sum;
  }
};

}  // namespace memloc
