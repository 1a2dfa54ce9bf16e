#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace lora_ext {

// Memory that a thread owns until the thread ends, so that a CPU call allocates only its result.
class Scratch {
  public:
    void* get(size_t bytes) {
        if (bytes > capacity_) {
            const size_t wanted = (std::max(bytes, 2 * capacity_) + 63) / 64 * 64;
            capacity_ = 0;  // reset before the allocation, which may fail
            memory_.reset(static_cast<char*>(std::aligned_alloc(64, wanted)));
            TORCH_CHECK(memory_ != nullptr, "lora_ext: out of memory for ", wanted,
                        " bytes of scratch");
            capacity_ = wanted;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    size_t capacity_ = 0;
};

}  // namespace lora_ext
