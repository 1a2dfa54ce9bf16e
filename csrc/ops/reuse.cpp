#include "ops/reuse.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <mutex>
#include <vector>

namespace lora_ext {
namespace {

class Blocks {
  public:
    // Returns a stored block of at least `bytes` and at most twice that size, and sets `bytes` to
    // its size; returns nullptr if there is no such block.
    void* take(size_t& bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (size_t i = blocks_.size(); i-- > 0;) {
            const Block block = blocks_[i];
            if (block.bytes < bytes || block.bytes > 2 * bytes) continue;
            blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
            held_ -= block.bytes;
            bytes = block.bytes;
            return block.memory;
        }
        return nullptr;
    }
    // Adds a block. If the total exceeds kMost, the oldest blocks are freed.
    void give(void* memory, size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        blocks_.push_back({memory, bytes});
        for (held_ += bytes; held_ > kMost; blocks_.erase(blocks_.begin())) {
            held_ -= blocks_.front().bytes;
            std::free(blocks_.front().memory);
        }
    }

  private:
    static constexpr size_t kMost = size_t{1} << 27;
    struct Block {
        void* memory;
        size_t bytes;
    };
    std::mutex mutex_;
    std::vector<Block> blocks_;
    size_t held_ = 0;
};

Blocks& blocks() {
    static auto* all = new Blocks;  // never destroyed: tensors may outlive static objects
    return *all;
}

constexpr size_t kPage = 4096;

}  // namespace

Tensor reused_memory(at::IntArrayRef sizes, const at::TensorOptions& options) {
    size_t bytes = at::detail::computeStorageNbytesContiguous(sizes, options.dtype().itemsize());
    if (!options.device().is_cpu() || bytes < 16 * kPage) return at::empty(sizes, options);
    bytes = (bytes + kPage - 1) / kPage * kPage;
    void* memory = blocks().take(bytes);
    if (memory == nullptr) memory = std::aligned_alloc(kPage, bytes);
    TORCH_CHECK(memory != nullptr, "lora_ext: out of memory for ", bytes, " bytes");
    return at::from_blob(
        memory, sizes, [bytes](void* dead) { blocks().give(dead, bytes); }, options);
}

}  // namespace lora_ext
