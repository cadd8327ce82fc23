// Reads requests from standard input and runs each in the executor: request.h has the protocol.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <stdexcept>

#include "executor.h"
#include "request.h"

namespace simt {
namespace {

std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> table;
  return table;
}

}  // namespace

Registration::Registration(const char* name, Op op) { ops()[name] = op; }

Buffer::Buffer(size_t bytes, size_t offset)
    : memory_(static_cast<char*>(std::malloc(bytes + offset))), bytes_(bytes), offset_(offset) {
  ASAN_POISON_MEMORY_REGION(memory_, offset / 8 * 8);
}

Buffer::~Buffer() {
  ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_ + offset_);
  std::free(memory_);
}

int64_t Request::i(const std::string& name) const {
  const auto found = integers.find(name);
  if (found == integers.end()) throw std::runtime_error("the request has no integer " + name);
  return found->second;
}

float Request::f(const std::string& name) const {
  const auto found = reals.find(name);
  if (found == reals.end()) throw std::runtime_error("the request has no real " + name);
  return static_cast<float>(found->second);
}

alula::CudaStream Request::stream() const {
  static const alula::CudaDevice device = {0, 9, 0, 4, 227 * 1024, true};
  return {&device, nullptr};
}

namespace {

void answer(const Request& request) {
  std::printf("ok\n");
  for (const std::string& name : request.results) {
    const Buffer& buffer = *request.tensors.at(name);
    std::printf("t %s %zu\n", name.c_str(), buffer.size());
    std::fwrite(buffer.data(), 1, buffer.size(), stdout);
  }
  std::printf("end\n");
}

std::string one_line(std::string text) {
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return text;
}

int serve() {
  std::string word, op;
  Request request;
  while (std::cin >> word) {
    if (word == "run") {
      int order = 0;
      std::cin >> op >> order;
      thread_order() = static_cast<Order>(order);
      request = Request();
    } else if (word == "i") {
      std::string name;
      std::cin >> name >> request.integers[name];
    } else if (word == "f") {
      std::string name, value;
      std::cin >> name >> value;
      request.reals[name] = std::strtod(value.c_str(), nullptr);
    } else if (word == "t") {
      std::string name;
      size_t bytes = 0, offset = 0;
      bool is_result = false;
      std::cin >> name >> bytes >> offset >> is_result;
      std::cin.get();  // the end of the line
      auto buffer = std::make_unique<Buffer>(bytes, offset);
      std::cin.read(buffer->data(), static_cast<std::streamsize>(bytes));
      request.tensors[name] = std::move(buffer);
      if (is_result) request.results.push_back(name);
    } else if (word == "end") {
      try {
        const auto found = ops().find(op);
        if (found == ops().end()) throw std::runtime_error("no op " + op);
        found->second(request);
        answer(request);
      } catch (const Fault& fault) {
        std::printf("fault %s\n", one_line(fault.what()).c_str());
      } catch (const std::exception& error) {
        std::printf("error %s\n", one_line(error.what()).c_str());
      }
      std::fflush(stdout);
    } else {
      std::fprintf(stderr, "what is %s?\n", word.c_str());
      return 2;
    }
  }
  return 0;
}

}  // namespace
}  // namespace simt

int main() {
  std::ios::sync_with_stdio(false);
  return simt::serve();
}
