"""Windows of four frames of a video: which stay whole, and what the others are compared with."""

from vispress.budget import allocate


def references(number: int) -> tuple[list[int], list[bool]]:
    """For each frame, the one it is compared with, and whether it is one of those that stay whole.

    Args:
        number: Frames of the video.
    """
    thirds = {i + 2 for i in range(0, number - 4, 4)}
    whole = [f % 2 == 0 and f not in thirds for f in range(number)]
    reference = [min(1, number - 1)]
    for frame in range(1, number):
        if frame % 2:
            reference.append(frame - 1)
        elif frame in thirds:
            reference.append(frame - 2)
        else:
            reference.append(max(f for f in range(frame) if whole[f]))
    return reference, whole


def frame_shares(whole: list[bool], size: int, num_keep: int) -> list[int]:
    """How many of `size` tokens each frame keeps: whole frames first, the others alike."""
    main = allocate(num_keep, [size if stays else 0 for stays in whole])
    rest = allocate(num_keep - sum(main), [0 if stays else size for stays in whole])
    return [a + b for a, b in zip(main, rest, strict=True)]
