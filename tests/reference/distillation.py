"""Knowledge distillation as Hinton, Vinyals and Dean (2015) write it, one number at a time."""

import math


def softened(logits, temperature):
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def distillation_loss(student, teacher, temperature):
    """T^2 KL(teacher || student), averaged over the rows of two lists of lists."""
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        p = softened(teacher_row, temperature)
        q = softened(student_row, temperature)
        for class_index in range(len(p)):
            total += p[class_index] * math.log(p[class_index] / q[class_index])
    return temperature**2 * total / len(student)


def cross_entropy(logits, labels):
    rows = zip(logits, labels, strict=True)
    return -sum(math.log(softened(row, 1.0)[label]) for row, label in rows) / len(labels)
