// A ring of stages in shared memory that cp.async fills, and the order of its copies and barriers.
#pragma once

#include "lx/device.h"

namespace lora_ext {

// Step s of `steps` uses stage s % kStages. While a step is used, the copies of the next kStages -
// 1 steps are in flight. All threads of the block must call the members in the same order. After
// the last step, the block must wait for all copies before it reuses the memory.
template <int kStages>
struct Ring {
    int steps;

    // Starts the copies of the first steps; copy(step) starts those of one step.
    template <class Copy>
    LX_DEVICE void fill(Copy&& copy) const {
#pragma unroll
        for (int step = 0; step < kStages - 1; ++step) {
            if (step < steps) copy(step);
            lx::cp_async_commit();
        }
    }
    // Waits for the stage of `step`, after which the block may read it, and starts copies into the
    // stage of the previous step. prepare(step) may change the elements that its own thread copied.
    template <class Copy, class Prepare>
    LX_DEVICE void consume(int step, Copy&& copy, Prepare&& prepare) const {
        lx::cp_async_wait_group<kStages - 2>();
        prepare(step);
        lx::syncthreads();  // the stage is complete, and the previous one has been read
        if (step + kStages - 1 < steps) copy(step + kStages - 1);
        lx::cp_async_commit();
    }
    template <class Copy>
    LX_DEVICE void consume(int step, Copy&& copy) const {
        consume(step, copy, [](int) {});
    }
};

}  // namespace lora_ext
