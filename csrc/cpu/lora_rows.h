// Iteration shared by the CPU twins of the LoRA family: the pages of a slot, the chunks of a plan,
// indexed rows. Compiled per instruction set like vec.h.
#pragma once

#include "lora_ext/lora_train.h"

#include "by_dtype.h"
#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

LX_INLINE int32_t clamp_rank(int32_t rank, int32_t max_rank) {
    return rank < 0 ? 0 : rank > max_rank ? max_rank : rank;
}

// Pages of one slot.
template <typename T>
struct Slot {
    const T* a;
    const T* b;
    const int32_t* table;
    int64_t a_page_stride, b_page_stride, a_row, b_row, in, out;
    int32_t rank;
    bool full_pages, float8;
    Acc<T> scale;

    // scaled: true if the scale multiplies the sums, false if a later step multiplies by it.
    Slot(const LoraBank& bank, int32_t slot, bool scaled = true)
        : a(static_cast<const T*>(bank.a)),
          b(static_cast<const T*>(bank.b)),
          table(bank.page_table),
          a_page_stride(bank.a_page_stride),
          b_page_stride(bank.b_page_stride),
          a_row(bank.a_row_stride),
          b_row(bank.b_row_stride),
          in(bank.in_features),
          out(bank.out_features),
          // The rank is clamped as in the kernels, because da and db also visit slots without rows,
          // whose ranks csrc/ops does not check.
          rank(bank.ranks ? clamp_rank(bank.ranks[slot], bank.max_rank) : bank.max_rank),
          full_pages(bank.full_pages),
          float8(bank.float8),
          scale(scaled && bank.scale ? bank.scale[slot] : 1) {
        if (table) {
            table += int64_t{slot} * bank.pages_per_slot;
        } else {
            a += slot * bank.a_slot_stride;
            b += slot * bank.b_slot_stride;
        }
    }
    int64_t page(int64_t p) const { return table ? table[p] : p; }
    const T* a_at(int64_t r) const { return a + page(r / 8) * a_page_stride + r % 8 * a_row; }
    const T* b_page(int64_t p) const { return b + page(p) * b_page_stride; }
    // Addresses of the same entries if `float8`; strides then count bytes.
    const uint8_t* a8_at(int64_t r) const {
        return reinterpret_cast<const uint8_t*>(a) + page(r / 8) * a_page_stride + r % 8 * a_row;
    }
    const uint8_t* b8_page(int64_t p) const {
        return reinterpret_cast<const uint8_t*>(b) + page(p) * b_page_stride;
    }
};

struct Chunk {
    int32_t slot, len;
    const int32_t* rows;
};
Chunk chunk_at(const LoraArgs& args, int64_t c) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    const int32_t* chunk = args.plan + layout.chunks() + 4 * c;
    return {chunk[0], chunk[2], args.plan + layout.perm() + chunk[1]};
}

// Calls f(chunk, part) for items [begin, end); item = part * number of chunks + chunk. Adjacent
// chunks of one slot are merged up to `most` rows.
template <typename F>
void for_chunks(const LoraArgs& args, int64_t begin, int64_t end, int64_t most, F&& f) {
    const int64_t chunks = args.plan[kPlanNumChunks];
    while (begin < end) {
        Chunk chunk = chunk_at(args, begin % chunks);
        const int64_t part = begin / chunks, last = min(end, (part + 1) * chunks);
        for (++begin; begin < last; ++begin) {
            const Chunk next = chunk_at(args, begin % chunks);
            if (next.slot != chunk.slot || chunk.len + next.len > most) break;
            chunk.len += next.len;
        }
        f(chunk, part);
    }
}

// Rows of a matrix, by index or in order.
template <typename E>
struct Rows {
    E* base;
    int64_t stride;
    const int32_t* index;
    LX_INLINE E* operator[](int64_t i) const { return base + (index ? index[i] : i) * stride; }
    Rows from(int64_t i) const {
        return index ? Rows{base, stride, index + i} : Rows{base + i * stride, stride, index};
    }
};

template <typename T>
Rows<const T> x_rows(const LoraArgs& args, const Chunk& chunk) {
    return {static_cast<const T*>(args.x), args.x_row_stride, chunk.rows};
}
template <typename T>
Rows<Acc<T>> v_rows(const LoraArgs& args, const Chunk& chunk) {
    return {static_cast<Acc<T>*>(args.v), args.v_row_stride, chunk.rows};
}

// Factors that v of one adapter is multiplied by, per row and per page (lora.h: has_factors).
template <typename T>
struct Factors {
    const float* scale;      // scale of each page of the slot
    const int32_t* groups;   // group of each page of the slot
    Rows<const float> rows;  // weights
    int64_t scale_step;

    Factors(const LoraArgs& args, const Chunk& chunk)
        : scale(args.bank.scale),
          groups(args.bank.groups),
          rows{args.weights, args.weights_row_stride, chunk.rows},
          scale_step(args.bank.scale_per_page) {
        if (scale) scale += chunk.slot * (scale_step ? int64_t{args.bank.pages_per_slot} : 1);
        if (groups) groups += chunk.slot * int64_t{args.bank.pages_per_slot};
    }
    Acc<T> scale_of(int64_t page) const { return scale ? scale[page * scale_step] : 1; }
    int64_t group(int64_t page) const { return groups ? groups[page] : 0; }
    Acc<T> weight(int64_t row, int64_t page) const {
        return rows.base ? rows[row][group(page)] : 1;
    }
    // Calls f(rank, end, scale, weight) for the ranks of each page of a row.
    template <typename F>
    LX_INLINE void for_pages(int64_t row, int64_t first, int64_t ranks, F&& f) const {
        for (int64_t r = first; r < first + ranks; r += 8)
            f(r, min(r + 8, first + ranks), scale_of(r / 8), weight(row, r / 8));
    }
};

}  // namespace
}  // namespace lora_ext::LX_ISA
