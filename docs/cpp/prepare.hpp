// From a picture to what an exported model takes, as "preprocessing" in export.json says: the same bytes as
// ray_retrieval makes of the same pixels. C++17, nothing but the standard library.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    int width = 0, height = 0;
    std::vector<uint8_t> pixels;  // height × width × 3, red, green, blue
};

struct Preprocessing {
    int size = 0, resize_to = 0;
    int least_side = 1;  // of what the model takes
    std::string resize, shapes;
    std::array<uint8_t, 3> border{};  // the mean colour
};

// A binary PPM of 8 bits ("P6"): `magick photo.jpg -auto-orient -background white -alpha remove -depth 8 photo.ppm`.
inline Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    auto number = [&file, &path]() {
        int value = -1;
        while ((file >> std::ws) && file.peek() == '#') file.ignore(1 << 20, '\n');
        if (!(file >> value)) throw std::runtime_error(path + ": no binary PPM");
        return value;
    };
    if (file.get() != 'P' || file.get() != '6') throw std::runtime_error(path + ": no binary PPM");
    Picture picture;
    picture.width = number(), picture.height = number();
    if (number() != 255 || picture.width < 1 || picture.height < 1)
        throw std::runtime_error(path + ": not of 8 bits");
    file.get();  // the one space before the pixels
    picture.pixels.resize(size_t(3) * picture.width * picture.height);
    if (!file.read(reinterpret_cast<char*>(picture.pixels.data()), std::streamsize(picture.pixels.size())))
        throw std::runtime_error(path + ": cut short");
    return picture;
}

// Half way between two whole numbers, the even one: what std::nearbyint does unless told otherwise.
inline int rounded(double value) { return int(std::nearbyint(value)); }

// Enough of a JSON reader for the numbers and words of one section of export.json.
inline std::string section_of(const std::string& text, const std::string& key) {
    const size_t at = text.find("\"" + key + "\":");
    if (at == std::string::npos) throw std::runtime_error("export.json says nothing of " + key);
    return text.substr(at);
}

inline std::string value_of(const std::string& text, const std::string& key) {
    const std::string rest = section_of(text, key);
    const size_t from = rest.find_first_not_of(" \"[\n", key.size() + 3);
    return rest.substr(from, rest.find_first_of(",\"\n]}", from) - from);
}

inline std::string text_of(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    if (!file) throw std::runtime_error(path + ": cannot be read");
    return text.str();
}

inline Preprocessing read_preprocessing(const std::string& path) {
    const std::string all = text_of(path);
    const std::string text = section_of(all, "preprocessing");
    std::string input = section_of(all, "inputs");
    input.resize(std::min(input.find("\"outputs\":"), input.size()));
    if (value_of(input, "dtype") != "uint8")
        throw std::runtime_error(path + ": a model of local features, whose pyramid is not done here");
    Preprocessing found;
    if (input.find("\"least_side\":") != std::string::npos)
        found.least_side = std::stoi(value_of(input, "least_side"));
    found.size = std::stoi(value_of(text, "size"));
    found.resize_to = std::stoi(value_of(text, "resize_to"));
    found.resize = value_of(text, "resize");
    found.shapes = value_of(text, "shapes");
    std::stringstream means(section_of(text, "mean").substr(std::string("\"mean\":").size()));
    for (uint8_t& channel : found.border) {
        char bracket_or_comma = 0;
        double mean = 0;
        if (!(means >> bracket_or_comma >> mean)) throw std::runtime_error(path + ": the mean is no three numbers");
        channel = uint8_t(rounded(255 * mean));
    }
    return found;
}

// One direction of Pillow's resampling: a filter as wide as the reduction, its weights and sums in whole
// numbers, the result rounded to 8 bits. `stride` is the way from a sample to the next, `others` how many
// lines there are and `other_stride` the way from one to the next, all in bytes; three channels each.
inline std::vector<uint8_t> resampled(const std::vector<uint8_t>& source, int length, int target, int others,
                                      bool along_rows, bool lanczos) {
    constexpr int kPrecision = 22;
    const double scale = double(length) / target, wide = std::max(1.0, scale);
    const double support = (lanczos ? 3.0 : 1.0) * wide;
    auto sinc = [](double x) {
        const double angle = x * M_PI;
        return x == 0.0 ? 1.0 : std::sin(angle) / angle;
    };
    auto weight = [&](double x) {
        if (lanczos) return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
        return std::abs(x) < 1.0 ? 1.0 - std::abs(x) : 0.0;
    };
    std::vector<uint8_t> made(size_t(3) * target * others);
    for (int to = 0; to < target; ++to) {
        const double centre = (to + 0.5) * scale;
        const int first = std::max(0, int(centre - support + 0.5));
        const int last = std::min(length, int(centre + support + 0.5));
        std::vector<double> weights;
        double sum = 0.0;
        for (int from = first; from < last; ++from) {
            weights.push_back(weight((from - centre + 0.5) * (1.0 / wide)));
            sum += weights.back();
        }
        std::vector<int> whole;
        for (double one : weights) {
            if (sum != 0.0) one *= 1.0 / sum;
            whole.push_back(int((one < 0 ? -0.5 : 0.5) + one * (1 << kPrecision)));
        }
        for (int line = 0; line < others; ++line) {
            for (int channel = 0; channel < 3; ++channel) {
                int total = 1 << (kPrecision - 1);
                for (int from = first; from < last; ++from) {
                    const size_t place = along_rows ? size_t(line) * length + from : size_t(from) * others + line;
                    total += source[3 * place + channel] * whole[from - first];
                }
                const size_t place = along_rows ? size_t(line) * target + to : size_t(to) * others + line;
                made[3 * place + channel] = uint8_t(std::clamp(total >> kPrecision, 0, 255));
            }
        }
    }
    return made;
}

inline Picture resized(const Picture& source, int width, int height, bool lanczos) {
    Picture made{width, height, source.pixels};
    if (width != source.width)
        made.pixels = resampled(made.pixels, source.width, width, source.height, true, lanczos);
    if (height != source.height)
        made.pixels = resampled(made.pixels, source.height, height, width, false, lanczos);
    return made;
}

// The sides of a picture whose longer one is at most `side`.
inline std::pair<int, int> fitted(int width, int height, int side) {
    if (std::max(width, height) <= side) return {width, height};
    const double proportion = double(width) / height;
    const bool upright = proportion <= 1;
    const double exact = upright ? side * proportion : side / proportion;
    auto miss = [&](int n) {
        if (upright) return std::abs(proportion - double(n) / side);
        return n ? std::abs(proportion - double(side) / n) : 0.0;
    };
    const int low = int(exact), high = int(std::ceil(exact));
    const int other = std::max(1, miss(high) < miss(low) ? high : low);
    return upright ? std::pair{other, side} : std::pair{side, other};
}

// The sides of a picture that is stretched to the nearest of some proportions, its own beyond the last.
inline std::pair<int, int> bucket(int width, int height, int side) {
    const int longer = std::max(width, height);
    double proportion = double(std::min(width, height)) / longer;
    if (proportion > 1.0 / 4) {
        double nearest = 1.0;
        for (double one : {4.0 / 5, 3.0 / 4, 2.0 / 3, 9.0 / 16, 1.0 / 2, 2.0 / 5, 1.0 / 3, 2.0 / 7, 1.0 / 4})
            if (std::abs(std::log(proportion / one)) < std::abs(std::log(proportion / nearest))) nearest = one;
        proportion = nearest;
    }
    if (longer < side) side = std::max(longer / 32 * 32, std::min(longer, 32));
    const int other = std::max(1, rounded(side * proportion));
    return width >= height ? std::pair{side, other} : std::pair{other, side};
}

// The picture in the middle of a square.
inline Picture padded(const Picture& picture, int side, const std::array<uint8_t, 3>& border) {
    Picture square{side, side, std::vector<uint8_t>(size_t(3) * side * side)};
    for (size_t place = 0; place < square.pixels.size(); ++place) square.pixels[place] = border[place % 3];
    const int left = (side - picture.width) / 2, top = (side - picture.height) / 2;
    for (int row = 0; row < picture.height; ++row)
        std::copy_n(&picture.pixels[size_t(3) * row * picture.width], 3 * picture.width,
                    &square.pixels[3 * (size_t(top + row) * side + left)]);
    return square;
}

// What goes into the model: 3 × height × width, all red, then all green, then all blue.
inline Picture prepared(const Picture& source, const Preprocessing& how) {
    Picture picture;
    if (how.resize == "long_side") {
        const auto [width, height] = how.shapes == "buckets" ? bucket(source.width, source.height, how.size)
                                                             : fitted(source.width, source.height, how.size);
        picture = resized(source, width, height, true);
        if (how.shapes == "pad") picture = padded(picture, how.size, how.border);
    } else {
        int width = how.resize_to, height = how.resize_to;
        if (how.resize == "short_side") {
            const double shorter = std::min(source.width, source.height);
            width = int(double(how.resize_to) * source.width / shorter);
            height = int(double(how.resize_to) * source.height / shorter);
        }
        const Picture whole = resized(source, width, height, false);
        const int left = rounded((width - how.size) / 2.0), top = rounded((height - how.size) / 2.0);
        picture = Picture{how.size, how.size, std::vector<uint8_t>(size_t(3) * how.size * how.size)};
        for (int row = 0; row < how.size; ++row)
            std::copy_n(&whole.pixels[3 * (size_t(top + row) * width + left)], 3 * how.size,
                        &picture.pixels[size_t(3) * row * how.size]);
    }
    if (std::min(picture.width, picture.height) < how.least_side)
        throw std::runtime_error("the picture is too small: the model takes sides from " +
                                 std::to_string(how.least_side) + " pixels");
    Picture planes{picture.width, picture.height, std::vector<uint8_t>(picture.pixels.size())};
    const size_t area = size_t(picture.width) * picture.height;
    for (size_t place = 0; place < area; ++place)
        for (size_t channel = 0; channel < 3; ++channel)
            planes.pixels[channel * area + place] = picture.pixels[3 * place + channel];
    return planes;
}
