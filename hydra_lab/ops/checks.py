"""Shape checks shared by the operations: one clear `ValueError` that names the argument."""

from collections.abc import Sequence

from torch import Tensor
from torch import _assert_async as assert_async  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None], axes: str) -> None:
    """Raise unless `tensor` has the expected shape.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        expected: size of each axis; None where any size will do.
        axes: names of the axes, for the message, such as "[B, L, H]".

    Raises:
        ValueError: the number of axes or the size of one of them is another.
    """
    shape = tuple(tensor.shape)
    sizes_agree = all(want is None or want == size for want, size in zip(expected, shape, strict=False))
    if len(shape) != len(expected) or not sizes_agree:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape {axes} = [{wanted}], got {list(shape)}")


def assert_on_device(condition: Tensor, message: str) -> None:
    """Check a value on its CUDA device without waiting for it.

    A condition that does not hold stops the device with an assertion, and the next call that waits for the device
    raises RuntimeError.

    Args:
        condition: [] bool.
        message: what is wrong, for the device's log.
    """
    assert_async(condition, message)
