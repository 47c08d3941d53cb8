// The block DSGA on a CPU for training: Y with what the backward pass needs, and every gradient.
//
// Types: T of the images (float, bfloat16, double), S of sums, parameters and their gradients (float; double for
// double).  Kept between the passes are W_p LN(X), with a border of zeros, and Q Kᵀ with the rows' sums of squares;
// everything else is recomputed.  An image is divided into DFGB's 8×8 blocks: what belongs to a block stays in the
// level-1 and level-2 caches.  Images of a batch are distributed among the threads, or, where there are fewer images
// than threads, rows of blocks of one image.
//
// Outside the levels: 3×3 convolutions of few channels, and the products that are gradients of kernels.
//
// backward.cpp and backward_float64.cpp have the entry points, which return 0, or 1 on a lack of memory.  training.py
// mirrors the structures, which are in training_vectors.h.
#pragma once

#include "training_batch.h"
#include "training_steps.h"
