// The code or the vector of a picture by an exported model: `describe EXPORT PICTURE.ppm`.
//
//   ray-retrieval export runs/quickstart/model --out exported
//   g++ -std=c++17 -O2 describe.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -o describe
//   magick photo.jpg -auto-orient -background white -alpha remove -depth 8 photo.ppm
//   ./describe exported photo.ppm
//
// ORT is the unpacked release of ONNX Runtime for the platform; files of 8 bits run the same way. A code is
// printed in hexadecimal, as `ray-retrieval embed` does, a vector as numbers. Models of local features are refused.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdio>
#include <iostream>

#include "prepare.hpp"

int main(int count, char** given) try {
    if (count != 3) throw std::runtime_error("usage: describe EXPORT PICTURE.ppm");
    const std::string folder = given[1];
    Picture picture = prepared(read_ppm(given[2]), read_preprocessing(folder + "/export.json"));

    Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "describe");
    Ort::Session session(environment, (folder + "/model.onnx").c_str(), Ort::SessionOptions{});
    const std::array<int64_t, 4> shape{1, 3, picture.height, picture.width};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto input = Ort::Value::CreateTensor<uint8_t>(memory, picture.pixels.data(), picture.pixels.size(),
                                                   shape.data(), shape.size());
    const char* inputs[] = {"images"};
    Ort::AllocatorWithDefaultOptions allocator;
    auto name = session.GetOutputNameAllocated(0, allocator);  // codes, or vectors
    const char* outputs[] = {name.get()};
    auto found = session.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);

    const auto about = found[0].GetTensorTypeAndShapeInfo();
    const size_t length = about.GetElementCount();
    if (about.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
        const uint8_t* code = found[0].GetTensorData<uint8_t>();
        for (size_t place = 0; place < length; ++place) std::printf("%02x", code[place]);
    } else {
        const float* vector = found[0].GetTensorData<float>();
        for (size_t place = 0; place < length; ++place) std::printf("%s%.6g", place ? " " : "", vector[place]);
    }
    std::printf("\n");
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
}
