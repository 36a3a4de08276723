// The promises of reader.h: what was read is what the file holds, kernels wait for it, failures are told, and after
// `cancel` nothing is written any more.
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>

#include "check_block.h"
#include "support.h"

using namespace octavo;
using namespace support;

namespace {

constexpr int64_t kMiB = 1 << 20;

struct File {
    FILE* file = std::tmpfile();
    int64_t size = 0;

    ~File() { std::fclose(file); }
    int fd() const { return fileno(file); }
    int64_t add(const void* data, int64_t nbytes) {
        if (std::fwrite(data, 1, size_t(nbytes), file) != size_t(nbytes) || std::fflush(file) != 0) std::abort();
        return (size += nbytes) - nbytes;
    }
};

Segment segment(const File& file, int64_t begin, uint8_t* to, int64_t nbytes) {
    return {file.fd(), begin, to, nbytes, nbytes, false};
}

// A matrix of the file in two places, which are still being read.
struct InParts {
    Guarded<uint8_t> head, tail;
    Matrix matrix;

    InParts(const Weights& of, const File& file, int64_t begin, int64_t panels, Reader& reader)
        : head(panels_bytes(of, panels)), tail(of.bytes.size() - head.size()), matrix(of.matrix) {
        matrix.data = head.data();
        matrix.tail = tail.data();
        matrix.split = panels;
        matrix.data_read = std::make_shared<Read>(std::vector{segment(file, begin, head.data(), head.size())});
        matrix.tail_read = std::make_shared<Read>(std::vector{segment(file, begin + head.size(), tail.data(), tail.size())});
        reader.start(matrix.tail_read, true);
        reader.start(matrix.data_read, false);
        if (panels % 2) reader.hurry(matrix.tail_read);
    }

    static int64_t panels_bytes(const Weights& of, int64_t panels) {
        const int64_t nbytes = panels * panel_bytes(of.matrix.format, of.matrix.cols);
        return std::min(nbytes, of.bytes.size());
    }
};

// All experts together, each in two parts, some of which come late: the bits are those of `moe`.
void check_mixture(const Three& formats, int64_t D, int64_t H, int64_t T, int64_t K) {
    Random random(uint32_t(D + 7 * H + T));
    const Layer layer(formats, 4, D, H, random);
    File file;
    std::vector<int64_t> begins;
    for (const Weights& weights : layer.weights) begins.push_back(file.add(weights.bytes.data(), weights.bytes.size()));
    Guarded<int64_t> ids(T * K);
    Guarded<float> scales(T * K), x(T * D), wanted(T * D), y(T * D);
    for (int64_t i = 0; i < T * K; ++i) ids[i] = (i + i / K) % 4, scales[i] = random.uniform();
    fill(x, random);
    moe(rows_of(x.data(), T, D), ids.data(), scales.data(), K, layer.experts, rows_of(wanted.data(), T, D));
    for (int round = 0; round < 6; ++round) {
        where = text("an expert in parts, T=%ld K=%ld round %d", long(T), long(K), round);
        set_threads(1 + round % 3);
        Reader reader(2);
        std::deque<InParts> parts;
        std::vector<std::pair<int64_t, Expert>> experts;
        for (int64_t e = 0; e < 4; ++e) {
            for (size_t i = size_t(3 * e); i < size_t(3 * e + 3); ++i) {
                const int64_t panels = ceil_div(layer.weights[i].matrix.rows, kPanelRows);
                parts.emplace_back(layer.weights[i], file, begins[i], random.below(panels + 1), reader);
            }
            const Matrix* made[3];
            for (size_t i = 0; i < 3; ++i) made[i] = &parts[size_t(3 * e) + i].matrix;
            experts.emplace_back(e, Expert{*made[0], *made[1], *made[2]});
        }
        std::fill(y.begin(), y.end(), 0.0f);
        moe_part(rows_of(x.data(), T, D), ids.data(), scales.data(), K, experts, rows_of(y.data(), T, D));
        expect_same_bits(y.data(), wanted.data(), y.size(), D, "by moe");
        for (const InParts& part : parts) expect(part.matrix.data_read->error() == 0, "a read failed");
        for (const InParts& part : parts) part.matrix.tail_read->wait();
    }
    set_threads(1);
}

// Reads of several parts, given up at any time; what was written is right, and all else as it was.
void check_cancel() {
    where = "reads that are given up";
    Random random(11);
    std::vector<uint8_t> data(size_t(9 * kMiB));
    for (uint8_t& byte : data) byte = uint8_t(random.bits() % 255);
    File file;
    file.add(data.data(), int64_t(data.size()));
    for (int round = 0; round < 8; ++round) {
        std::vector<uint8_t> to(data.size(), 255);
        std::vector<std::shared_ptr<Read>> reads;
        {
            Reader reader(1 + round % 3);
            for (int64_t at = 0; at < 9; at += 3) {
                const Segment one = segment(file, at * kMiB, to.data() + at * kMiB, 3 * kMiB);
                reads.push_back(std::make_shared<Read>(std::vector{one}));
                reader.start(reads.back(), at % 2 == 1);
            }
            if (round % 2) reader.cancel(reads[size_t(round) % 3]);
            if (round % 4 == 0) reads[0]->wait();
        }
        for (size_t i = 0; i < reads.size(); ++i) {
            expect(reads[i]->done(), "a read is not done, though its reader has ended");
            const auto* got = to.data() + i * 3 * kMiB;
            const auto* there = data.data() + i * 3 * kMiB;
            if (reads[i]->error() == 0) expect(std::memcmp(got, there, size_t(3 * kMiB)) == 0, "other bytes were read");
            else expect(reads[i]->error() == Read::kCancelled, "error %d", reads[i]->error());
        }
    }
}

void check_failures() {
    where = "reads that fail";
    File file;
    file.add("0123456789", 10);
    uint8_t to[64] = {};
    Reader reader(2);
    const auto run = [&](Segment one) {
        const auto read = std::make_shared<Read>(std::vector{one});
        reader.start(read, false);
        read->wait();
        return read;
    };
    Segment one = segment(file, 4, to, 16);
    one.needed = 6;
    auto read = run(one);
    expect(read->error() == 0 && std::memcmp(to, "456789", 6) == 0, "the file's end was not read");
    one.needed = 7;
    read = run(one);
    expect(read->error() == Read::kShort && read->failed_at() == 10, "error %d at %ld", read->error(), long(read->failed_at()));
    expect(read->failed_fd() == file.fd(), "the file is %d", read->failed_fd());
    one.fd = -1;
    expect(run(one)->error() == EBADF, "a file that is not open was read");
}

}  // namespace

void check_reader(bool thoroughly) {
    check_failures();
    check_cancel();
    for (const int64_t T : {int64_t(1), int64_t(3), int64_t(12)}) {
        check_mixture({Format::q4, Format::q4, Format::q4}, 40, 70, T, 2);
        check_mixture({Format::bf16, Format::q8, Format::q3}, 72, 130, T, 3);
        if (thoroughly) check_mixture({Format::q3, Format::q2, Format::bf16}, 300, 513, T, 1);
    }
}
