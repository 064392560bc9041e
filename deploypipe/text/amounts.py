"""Numbers for people: counts, sizes and amounts with their unit."""


def amount(value: float, unit: str) -> str:
    """A number with its unit; large counts get a k, M or G."""
    return f"{number(value)} {unit}".strip()


def number(value: float) -> str:
    """Four significant digits; thousands, millions and thousand millions shortened."""
    if abs(value) >= 1e4:
        return count(value)
    return f"{value:.4g}"


def count(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {suffix}"
    return f"{value:.4g}"


def file_size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.2f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"
