"""Series: how time grows with length, with the image share of MMCA, and with the number of keys when decoding."""

from dataclasses import replace

from .cases import attention, mmca, square

TOKENS = 1536  # of the MMCA series, whatever their share of image


def image_share(percent):
    """Text around two images, which together are this share of the tokens."""
    image = round(TOKENS * percent / 200)
    text = (TOKENS - 2 * image) // 3
    segments = [
        ("text", text),
        ("image", image),
        ("text", text),
        ("image", image),
        ("text", TOKENS - 2 * image - 2 * text),
    ]
    return [segment for segment in segments if segment[1]]


def only_sdpa(case):
    return replace(case, peers={"SDPA": case.peers["SDPA"]})


def all_series():
    """({"series", "x"}, case) for every point of every series."""
    for series, is_causal in (("attention", False), ("causal attention", True)):
        for exponent in range(8, 14):
            length = 2**exponent
            case = square(f"{series}, {length} tokens", 4, length, 64, is_causal=is_causal)
            yield {"series": series, "x": length}, only_sdpa(case)
    for image_rows in ("self", "block"):
        for percent in range(0, 100, 10):
            case = mmca(f"MMCA {image_rows}, {percent}% image", image_rows, image_share(percent))
            yield {"series": f"MMCA {image_rows}", "x": percent}, case
    for dtype in ("fp32", "bf16", "fp16"):
        for exponent in range(9, 16):
            keys = 2**exponent
            case = attention(f"decode {dtype}, {keys} keys", (1, 8, 2, 1, keys, 64), dtype)
            yield {"series": f"decode {dtype}", "x": keys}, replace(only_sdpa(case), backward=False)
