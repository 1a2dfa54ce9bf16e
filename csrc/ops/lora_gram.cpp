// Inner products of adapters: checks, allocation, choice of CPU twin or CUDA kernel.
//
// The adapters of a call may differ in dtype; adapters of one dtype run together, in order.
#include "ops/lora_gram.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

#include "lora_ext/lora_gram.h"
#include "ops/checks.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Below this number of multiplications a parallel region costs more than a second thread saves.
constexpr int64_t kSerialWork = 1 << 17;

// Supported dtypes; float64 is supported on every device.
constexpr std::pair<at::ScalarType, DType> kDTypes[] = {{at::kFloat, DType::kFloat32},
                                                        {at::kHalf, DType::kFloat16},
                                                        {at::kBFloat16, DType::kBFloat16},
                                                        {at::kDouble, DType::kFloat64}};

void check_factor(const char* op, const char* name, size_t i, const Tensor& t, at::Device device) {
    const auto argument = words(name, "[", i, "]");
    require(t.device() == device, op, argument, expected("a tensor on ", device),
            found(t.device()));
    const bool known = std::any_of(std::begin(kDTypes), std::end(kDTypes),
                                   [&](const auto& pair) { return pair.first == t.scalar_type(); });
    require(known, op, argument, expected("float32, float16, bfloat16 or float64"),
            found(t.scalar_type()));
    require(t.size(0) <= kMaxSize && t.size(1) <= kMaxSize, op, argument,
            expected("at most ", kMaxSize, " rows and columns"), found(t.sizes()));
}

// Adapters of one call, and the copies that own their factors.
class Call {
  public:
    Call(const char* op, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
         const std::vector<Tensor>* p)
        : op_(op) {
        check_count("b", a, b);
        if (p) check_count("projected_b", a, *p);
        adapters_.resize(a.size());
        dtypes_.resize(a.size());
        for (size_t i = 0; i < a.size(); ++i) {
            require(a[i].dim() == 2, op, words("a[", i, "]"), expected("shape (r, I)"),
                    found(a[i].sizes()));
            check_factor(op, "a", i, a[i], a[0].device());
            check_b("b", i, a[i], b[i]);
            if (!p) continue;
            check_b("projected_b", i, a[i], (*p)[i]);
            require((*p)[i].sizes() == b[i].sizes(), op, words("projected_b[", i, "]"),
                    expected("shape (O, r) = ", b[i].sizes()), found((*p)[i].sizes()));
        }
        for (size_t i = 0; i < a.size(); ++i) {
            at::ScalarType& common = dtypes_[i];
            common = c10::promoteTypes(a[i].scalar_type(), b[i].scalar_type());
            if (p) common = c10::promoteTypes(common, (*p)[i].scalar_type());
            GramAdapter& adapter = adapters_[i];
            adapter.rank = static_cast<int32_t>(a[i].size(0));
            adapter.in_features = static_cast<int32_t>(a[i].size(1));
            adapter.out_features = static_cast<int32_t>(b[i].size(0));
            adapter.a = rows_of(a[i], common, adapter.a_stride);
            adapter.b = rows_of(b[i], common, adapter.b_stride);
            if (p) adapter.p = rows_of((*p)[i], common, adapter.p_stride);
        }
    }

    size_t size() const { return adapters_.size(); }
    GramAdapter& operator[](size_t i) { return adapters_[i]; }
    at::ScalarType dtype(size_t i) const { return dtypes_[i]; }

    // Computes all adapters, one dtype at a time; items_of(rank) is the number of items of an
    // adapter.
    template <class Launch>
    void run(const Tensor& like, bool float64, int64_t (*items_of)(int64_t),
             void (*GramCpu::*twin)(const GramArgs&, int64_t, int64_t), Launch&& launch) const {
        const c10::DeviceGuard guard(like.device());
        for (const auto& [scalar_type, dtype] : kDTypes) {
            std::vector<GramAdapter> chosen;
            GramArgs args;
            int64_t work = 0;
            for (size_t i = 0; i < adapters_.size(); ++i) {
                const GramAdapter& adapter = adapters_[i];
                if (dtypes_[i] != scalar_type || adapter.rank == 0) continue;
                chosen.push_back(adapter);
                args.items = std::max(args.items, items_of(adapter.rank));
                work += (int64_t{adapter.in_features} + adapter.out_features) * adapter.rank *
                        adapter.rank / 2;
            }
            if (chosen.empty()) continue;
            args.dtype = dtype;
            args.float64 = float64 || dtype == DType::kFloat64;
            args.adapters = chosen.data();
            args.num_adapters = static_cast<int64_t>(chosen.size());
            if (launches_kernels(like)) {
                check_launch(op_, launch(args, current_stream(like)));
            } else {
                const GramCpu& cpu = chosen_twins<GramCpu>();
                std::vector<int64_t> items;  // existing items, ordered by item, then by adapter
                for (int64_t item = 0; item < args.items; ++item)
                    for (size_t i = 0; i < chosen.size(); ++i)
                        if (item < items_of(chosen[i].rank))
                            items.push_back(static_cast<int64_t>(i) * args.items + item);
                // Thread i takes items i, i + hands, ..., so that the items of a large adapter are
                // spread over all threads.
                const auto count = static_cast<int64_t>(items.size());
                const int64_t hands = std::min<int64_t>(at::get_num_threads(), count);
                for_items(hands, work / hands, kSerialWork, [&](int64_t begin, int64_t end) {
                    for (int64_t hand = begin; hand < end; ++hand)
                        for (int64_t k = hand; k < count; k += hands)
                            (cpu.*twin)(args, items[k], items[k] + 1);
                });
            }
        }
    }

  private:
    const char* op_;
    std::vector<GramAdapter> adapters_;
    std::vector<at::ScalarType> dtypes_;
    std::vector<Tensor> kept_;

    void check_count(const char* name, const std::vector<Tensor>& a,
                     const std::vector<Tensor>& others) const {
        require(a.size() == others.size(), op_, name, expected("as many tensors as a, ", a.size()),
                found(others.size()));
    }
    void check_b(const char* name, size_t i, const Tensor& a, const Tensor& t) const {
        require(t.dim() == 2 && t.size(1) == a.size(0), op_, words(name, "[", i, "]"),
                expected("shape (O, r) with r = ", a.size(0)), found(t.sizes()));
        check_factor(op_, name, i, t, a.device());
    }
    // Return the rows of t in `dtype`, copied if the stride exceeds int32.
    const void* rows_of(const Tensor& t, at::ScalarType dtype, int32_t& stride) {
        Tensor rows = rows_contiguous(t.scalar_type() == dtype ? t : t.to(dtype));
        if (rows.stride(0) > kMaxSize) rows = rows.contiguous();
        if (!rows.is_same(t)) kept_.push_back(rows);
        stride = static_cast<int32_t>(rows.stride(0));
        return rows.const_data_ptr();
    }
};

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>> lora_gram(
    const std::vector<Tensor>& a, const std::vector<Tensor>& b,
    const std::optional<at::ScalarType>& dtype) {
    constexpr const char* op = "lora_gram";
    require(!dtype || *dtype == at::kFloat || *dtype == at::kDouble, op, "dtype",
            expected("None, float32 or float64"), found(dtype.value_or(at::kFloat)));
    Call call(op, a, b, nullptr);
    std::vector<Tensor> gram_a(a.size()), gram_b(a.size());
    for (size_t i = 0; i < a.size(); ++i) {
        GramAdapter& adapter = call[i];
        const bool float64 = call.dtype(i) == at::kDouble || dtype == at::kDouble;
        const auto options = a[i].options().dtype(float64 ? at::kDouble : at::kFloat);
        gram_a[i] = at::empty({adapter.rank, adapter.rank}, options);
        gram_b[i] = at::empty({adapter.rank, adapter.rank}, options);
        adapter.gram_a = gram_a[i].mutable_data_ptr();
        adapter.gram_b = gram_b[i].mutable_data_ptr();
    }
    if (a.empty()) return {gram_a, gram_b};
    call.run(a[0], dtype == at::kDouble, gram_items, &GramCpu::gram, launch_lora_gram);
    if (dtype == at::kFloat)  // sums of float64 factors are float64, rounded here once
        for (auto* grams : {&gram_a, &gram_b})
            for (Tensor& gram : *grams) gram = gram.to(at::kFloat);
    return {gram_a, gram_b};
}

Tensor lora_pair_stats(const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                       const std::vector<Tensor>& projected_b) {
    constexpr const char* op = "lora_pair_stats";
    Call call(op, a, b, &projected_b);
    if (a.empty()) return at::zeros({0, 4}, at::kDouble);
    int64_t most = 1;
    for (size_t i = 0; i < call.size(); ++i) most = std::max(most, pair_items(call[i].rank));
    auto tiles = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(most)));
    const auto count = static_cast<int64_t>(call.size());
    Tensor parts = at::zeros({count, tiles, 4}, a[0].options().dtype(at::kDouble));
    for (int64_t i = 0; i < count; ++i)
        call[i].gram_a = parts.mutable_data_ptr<double>() + i * tiles * 4;
    call.run(a[0], true, pair_items, &GramCpu::pair_stats, launch_lora_pair_stats);
    // Pairwise summation. The order does not depend on other adapters, because tiles beyond the end
    // of an adapter are zero.
    for (; tiles > 1; tiles /= 2)
        parts = parts.slice(1, 0, tiles, 2).add(parts.slice(1, 1, tiles, 2));
    return parts.select(1, 0).contiguous();
}

}  // namespace lora_ext
