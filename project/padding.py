"""What fills up the share of a process that has fewer images than others: it counts for nothing."""

#: In the place of an image's index. It stands for the last image, without its label.
PADDING = -1
#: Its label, the one that torch's cross-entropy ignores as well.
IGNORED = -100
