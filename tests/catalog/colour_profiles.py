"""ICC profiles, written byte by byte as the ICC's specification lays them out."""

import struct

import numpy as np

SRGB_TO_XYZ = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
"""Adapted to D50, as profiles have it."""
P3_TO_XYZ = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
"""Display P3's, adapted to D50."""
_D50 = (0.9642, 1.0, 0.8249)


def srgb_curve(linear):
    """sRGB's transfer function, which Display P3 has too: [0, 1] to [0, 1]."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def srgb_linear(value):
    """Its inverse."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def matrix_profile(to_xyz):
    """An RGB display's profile: primaries in the columns of `to_xyz` (3, 3), sRGB's curve."""
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {b"wtpt": _xyz(_D50)}
    tags |= {name + b"XYZ": _xyz(to_xyz[:, index]) for index, name in enumerate((b"r", b"g", b"b"))}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma):
    """A profile of greys of this gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(_D50), b"kTRC": curve})


def ink_profile(corners):
    """A printer's profile: `corners` gives CIELAB for inks (C, M, Y, K) that are all or nothing, linear between."""
    identity = bytes(range(256))
    head = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    grid = b""
    for number in range(16):
        lightness, a, b = corners(*(number >> shift & 1 for shift in (3, 2, 1, 0)))
        grid += bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])
    return _profile(
        b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(_D50), b"A2B0": head + identity * 4 + grid + identity * 3}
    )


def _fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values):
    return b"XYZ " + bytes(4) + _fixed(*values)


def _profile(kind, space, connection, tags):
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)} | tags
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = bytes(8) + struct.pack(">I", 0x02400000) + kind + space + connection
    head += bytes(12) + b"acsp" + bytes(28) + _fixed(*_D50) + bytes(48)
    profile = head + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(profile)) + profile[4:]
