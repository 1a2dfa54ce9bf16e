// Overlapping launches, as programmatic dependent launch allows them on a GPU, in the order that
// most likely shows a mistake. A dependent launch starts as soon as every block of the previous
// launch has called grid_dependency_launch() or ended, and runs up to its grid_dependency_wait().
// Only then does the previous launch continue: until then, its threads that have passed their own
// wait stay in grid_dependency_launch(). A kernel that reads too early thus reads old values, and
// one that writes too early destroys data that the previous launch still reads. All blocks of the
// launches under way take turns.
#include <algorithm>
#include <cstring>
#include <memory>

#include "emu/machine.h"

namespace lx::emu {

namespace {

// Maximum number of threads of all launches under way. Each thread has a stack, and a process may
// have about 65,000 mappings.
constexpr int kMaxThreadsUnderWay = 16384;
constexpr int kKeptStacks = 1024;

struct Queued {
    Launch launch;
    bool resident;
    void (*body)(void*);
    std::unique_ptr<unsigned char[]> arguments;
    size_t argument_bytes;
    std::vector<Buffer> declared;

    Grid grid{};  // valid once the launch has started
    Turns turns{};
    Overlap overlap{};
    int first_stack = 0;
    bool in_chain = false;  // extend_chain() has been called

    bool under_way() const { return grid.overlap && !overlap.ended; }
};
std::vector<std::unique_ptr<Queued>> queue;

// Makes a launch the current one of the machine during the lifetime of this object.
struct Entered {
    Queued& queued;
    explicit Entered(Queued& queued) : queued(queued) {
        std::swap(static_cast<Grid&>(machine), queued.grid);
    }
    ~Entered() { std::swap(static_cast<Grid&>(machine), queued.grid); }
};

// Runs a launch until all its threads wait. Returns whether any thread could run.
bool run_on(Queued& q) {
    const Entered entered(q);
    bool moved = false;
    while (!machine.stopped && q.turns.run()) moved = true;
    if (q.turns.left == 0 && !q.overlap.ended && !machine.stopped) {
        finish_grid();
        q.overlap.ended = 1;
        q.turns.clear();
    }
    return moved;
}

void put_in_chain(Queued& q) {
    if (q.in_chain) return;
    const Entered entered(q);
    extend_chain();
    q.in_chain = true;
}

// Starts launch i of the queue. Returns 0 or an error.
int start(size_t i) {
    Machine& m = machine;
    Queued& q = *queue[i];
    if (i > 0) put_in_chain(*queue[i - 1]);
    for (const auto& other : queue)
        if (other->under_way())
            q.first_stack = std::max(
                q.first_stack, other->first_stack + static_cast<int>(other->turns.blocks.size()) *
                                                        other->grid.num_threads);
    q.grid = {};
    const Entered entered(q);
    prepare(q.launch, q.resident, q.body, q.arguments.get(), q.argument_bytes,
            std::move(q.declared));
    check_chain();
    if (const int error = configuration_error()) return error;
    const uint64_t threads = q.first_stack + num_blocks() * m.num_threads;
    if (threads > kMaxThreadsUnderWay) {
        report("resources", Place(),
               std::to_string(threads) + " threads of overlapping launches, the limit is " +
                   std::to_string(kMaxThreadsUnderWay));
        return kInvalidValue;
    }
    m.in_turns = true;
    m.overlap = &q.overlap;
    q.overlap.before = i > 0 ? &queue[i - 1]->overlap.ended : nullptr;
    q.overlap.unreleased = num_blocks();
    for_each_block([&](uint3 index) {
        q.turns.add(index, q.first_stack + static_cast<int>(q.turns.left) * m.num_threads);
    });
    return 0;
}

// Returns whether launch i may start. All launches before it must have started.
bool may_start(size_t i) {
    const auto ended = [](size_t k) { return queue[k]->overlap.ended == 1; };
    size_t all_ended = 0;  // launches from the front that have ended
    while (all_ended < i && ended(all_ended)) ++all_ended;
    if (all_ended == i) return true;
    if (!queue[i]->launch.dependent || queue[i - 1]->overlap.unreleased > 0) return false;
    return machine.options.overlapping == Overlapping::kDeep || all_ended + 1 == i;
}

int run_queue() {
    size_t next = 0;
    while (!machine.stopped) {
        if (next < queue.size() && may_start(next)) {
            if (const int error = start(next)) return error;
            run_on(*queue[next++]);  // up to its wait, before the previous launch continues
            continue;
        }
        bool moved = false;
        for (size_t i = 0; i < next && !moved; ++i)
            if (queue[i]->under_way()) moved = run_on(*queue[i]);
        if (moved) continue;
        const auto first =
            std::find_if(queue.begin(), queue.end(), [](const auto& q) { return q->under_way(); });
        if (first == queue.end()) break;
        Queued& q = **first;
        if (q.overlap.may_go_on) {
            const Entered entered(q);
            q.turns.report_deadlock();
            break;
        }
        q.overlap.may_go_on = 1;
    }
    return machine.num_reports ? kLaunchFailure : 0;
}

}  // namespace

void wait_for_launch() {
    const Overlap* const own = machine.overlap;
    if (own && own->before && !*own->before && !machine.current->dependency_met)
        wait_for_blocks("grid_dependency_wait", own->before, 1, Site::current());
}

void release_next(Block& block) {
    if (!machine.overlap || block.released) return;
    block.released = true;
    --machine.overlap->unreleased;
}

void let_launch_start() {
    Overlap* const own = machine.overlap;
    if (!own) return;
    release_next(machine);
    if (machine.current->dependency_met && !own->may_go_on)
        wait_for_blocks("grid_dependency_launch", &own->may_go_on, 1, Site::current());
}

void enqueue(const Launch& launch, bool resident, void (*body)(void*), void* arguments,
             size_t argument_bytes, std::vector<Buffer> declared) {
    auto copy = std::make_unique<unsigned char[]>(argument_bytes);
    memcpy(copy.get(), arguments, argument_bytes);
    auto queued = std::make_unique<Queued>();
    queued->launch = launch, queued->resident = resident, queued->body = body;
    queued->arguments = std::move(copy), queued->argument_bytes = argument_bytes;
    queued->declared = std::move(declared);
    queue.push_back(std::move(queued));
}

int synchronize() {
    const std::lock_guard<std::mutex> guard(launch_lock);
    begin_reports();
    const int status = run_queue();
    if (!queue.empty()) put_in_chain(*queue.back());
    queue.clear();
    free_stacks(kKeptStacks);
    forget_launch();
    finish_reports();
    return status;
}

}  // namespace lx::emu
