"""is_equal: equal and unequal pairs by family, agreement with sympy, policies, hostile input."""

import itertools
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rewards
from rewards import extract_answer, gold_answer, is_equal

ROOT = Path(__file__).resolve().parent.parent

# Every pair is tried in both orders. One family per entry, pairs on lines, sides parted by " == ".
EQUAL = {
    "integers": r"""
        7 == 7.0 == 7. == +7 == 007 == \text{7} == \mathbf{7} == $7$ == \(7\) == \[7\] == {7}
        7 == (7) == 7\quad
        7 == \ 7 == 7\! == 1\cdot 7
        -5 == −5 == –5 == -5.00 == \frac{-10}{2}
        2+4 == 6 == 3! == \binom{6}{1} == \sqrt{36} == 2\times 3""",
    "thousands": r"""
        1000 == 1,000 == 1{,}000 == 1,\!000 == 1\,000 == 1 000 == 1~000 == 1\ 000 == 10^3 == 1e3
        12,345,678 == 12345678 == 12{,}345{,}678 == 12\,345\,678
        \$1,234.50 == 1234.5 == 1,\!234.50\text{ dollars}
        \frac{1}{29,322,216} == \dfrac{1}{29,\!322,\!216}""",
    "decimals": r"""
        .5 == 0.5 == \frac12 == 0.50 == 1/2 == \frac{1}{2} == 5\cdot 10^{-1} == 2^{-1}
        0.28 == \frac{7}{25}
        -3.5 == -\frac{7}{2} == -7/2 == \frac{-7}{2} == \frac{7}{-2}""",
    "fractions": r"""
        \frac{3}{4} == \dfrac{3}{4} == \tfrac34 == \frac34 == \frac 3 4 == \frac3{4}
        \frac{3}{4} == \cfrac{3}{4} == 3/4
        \frac{3}{4} == ¾ == \frac{6}{8} == 3\div 4
        \frac{{{1}}}{{{2}}} == \frac12
        1+\frac{1}{1+\frac{1}{2}} == \frac53
        \frac{40}7 == \frac{40}{7}""",
    "mixed numbers": r"""
        2\frac{1}{4} == 2\frac14 == 2 1/4 == \frac94 == 2.25 == 2 \tfrac{1}{4} == 2¼
        -15\frac{3}{5} == -15.6
        137 \frac{1}{2} == 137.5""",
    "powers of ten": r"""
        8.7 \times 10^{8} == 8.7e8 == 870000000 == 8.7E8 == 8.7e+8 == 8.7\cdot 10^8
        8.7 \times 10^{8} == 8.7×10^8 == 8.7 x 10^8
        8.7 \times 10^{8} == 8.7*10^{8} == 87\times 10^7 == 8.7×10⁸
        2.5 \times 10^{-19} == 2.5e-19
        .0000914 == 9.14\times10^{-5}""",
    "roots": r"""
        2\sqrt{5} == \sqrt{20} == 2\sqrt5 == 2√5 == 2*sqrt(5) == 2\cdot\sqrt 5
        2\sqrt{5} == 2\cdot 5^{1/2} == \sqrt{5}\cdot 2
        \frac{\sqrt{3}}{3} == \frac{1}{\sqrt{3}} == \frac{\sqrt 3}3 == 3^{-1/2}
        \sqrt[3]{-8} == -2
        \sqrt{3+2\sqrt2} == 1+\sqrt2
        10\sqrt[3]{2} == \sqrt[3]{2000}
        \sqrt{\frac12} == \frac{\sqrt{2}}{2}""",
    "constants": r"""
        \frac{\pi}{2} == \frac\pi2 == \pi/2 == 0.5\pi == π/2 == \frac12 \pi
        2\pi == 2π == 2pi == \pi\cdot 2 == 2\,\mathrm{pi}
        e^{i\pi} == -1
        3+4i == 4i+3 == 3+4 i == 3+4\cdot i
        \sqrt{-4} == 2i""",
    "algebra": r"""
        (x+1)(x+2) == x^2+3x+2 == (x+2)(x+1) == x²+3x+2
        \frac{x+2}{7} == \frac{x}{7}+\frac{2}{7}
        x\sqrt{5x} == \sqrt{5x^3}
        \frac{1}{x}+\frac1y == \frac{x+y}{xy}
        -(a+b) == -a-b
        x^{10} == x^10
        a/b == \frac{a}{b} == a b^{-1}
        \frac{x^2-1}{x-1} == x+1
        2 a b == 2ba == b\cdot 2a
        \left[e^{hc/(\lambda k T)}-1\right]^{-1} == \frac{1}{e^{\frac{hc}{\lambda k T}} - 1}
        I(0)e^{-\frac{t}{RC}} == I(0) e^{-t/(RC)}
        x_{0}+\rho_1 == \rho_{1}+x_0""",
    "functions": r"""
        \sin^2 x == 1-\cos^2 x == (\sin x)^2 == \sin^{2}(x) == sin(x)^2
        \tan^{-1} 1 == \frac{\pi}{4} == \arctan(1) == arctan(1)
        \log_2 8 == 3
        \ln\sqrt{x} == \frac12\ln x
        \log_{10} 250 == \frac{\ln 250}{\ln 10}
        \exp(-t) == e^{-t} == \frac{1}{e^t}
        \cos(60^\circ) == \frac12 == \sin 30° == \sin\frac{\pi}{6}
        2\sin 5x\cos x == \sin 6x+\sin 4x""",
    "whole numbers": r"""
        \frac{n(n+1)}{2} == \binom{n+1}{2}
        \frac{n!}{(n-2)!} == n(n-1)
        \lceil n/2\rceil+1 == \lfloor (n+1)/2\rfloor+1
        m n-\lfloor m / 2\rfloor == mn-\left\lfloor \frac m2 \right\rfloor
        \frac{1}{2004!} == 1/2004!
        \frac{100!}{2^{50}} == 100!\cdot 2^{-50}
        |x| == \sqrt{x^2} == \left|-x\right|
        |xy| == \sqrt{x^2y^2} == |x||y|
        \sqrt{a^2b^2} == ab
        \sqrt{4\pi G\rho_0 r_0^2} == 2 r_0\sqrt{\pi G\rho_0}""",
    "percent, degrees, money": r"""
        10\% == 10 == 10% == 10\text{ percent} == 10 percent
        90^\circ == 90 == 90° == 90^{\circ} == 90\text{ degrees} == 90 \degree
        \$5 == 5 == $5 == \text{\$}5 == 5\text{ dollars} == 5 dollars == \$5.00
        1950^\circ C == 1950""",
    "units": r"""
        5\text{ cm} == 5 == 5 cm == 5\,\mathrm{cm} == 5\text{ centimeters} == 5~\mathrm{cm}
        5\text{ cm} == 5\mbox{ cm}
        15\text{ cm}^2 == 15 == 15\text{ square centimeters} == 15 cm^2 == 15\text{ sq. cm}
        15000 \text{ kcal m}^{-2} \text{yr}^{-1} == 15000
        6\frac{1}{6}\text{ feet} == \frac{37}{6}
        16\text{ widgets} == 16
        1000\text{ m} == 1000 m
        12 N == 12\text{ N} == 12\text{ newtons}
        8\!:\!34 \text{ p.m.} == 8:34 pm == 8:34 PM
        60\text{ miles per hour} == 60\text{ miles/hour} == 60 mph == 60
        28\% == 28 pct == 28\text{ percentage}
        2\,\mathrm{m/s} == 2""",
    "names": r"""
        x=5 == 5 == x = 5.0 == 5=x == x=5\text{ cm} == $x = 5$
        y=2x+3 == 2x+3 == y=3+2x == 2x-y+3=0 == y-2x=3
        f(x)=x^2 == x^2 == f(x) = x \cdot x
        A=\pi r^2 == \pi r^2
        \angle ABC=30^\circ == 30
        \text{Area}=5 == 5
        x = 2+3 = 5 == 5
        x\approx 5.66 == 5.66 == \approx 5.66 == 5.66\approx 5.7
        \theta\approx 5.66 == 5.66
        \pi == \pi\approx 3.14
        x\approx 5.6, y\approx 3 == y=3,x=5.6""",
    "equations": r"""
        x+y=5 == y+x=5 == 5=x+y == 2x+2y=10 == x+y-5=0
        x^2-1=0 == (x-1)(x+1)=0
        \frac{x^2}{9}+\frac{y^2}{4}=1 == 4x^2+9y^2=36
        x' + \frac{r}{V}x - rc = 0 == x^{\prime}+\frac{r}{V} x-r c=0
        \frac{dx}{dt}=kx-a == \frac{dx}{dt}-kx+a=0
        x\ne 3 == 3\neq x""",
    "inequalities": r"""
        x<5 == 5>x == 2x<10
        2<x\le 5 == 5\ge x>2 == 2<x\leqslant 5
        s^2 \le 8r^2 == 8r^2\ge s^2 == s² ≤ 8r²
        x<-1 \text{ or } x>1 == x>1,x<-1""",
    "lists": r"""
        1,2,3 == 3,2,1 == \{1,2,3\} == \left\{3, 1, 2\right\} == 1, 2, \text{ and } 3
        1,2,3 == 1,2,3. == x=1,2,3
        1,2,3 == 1;2;3 == x=1 \text{ or } x=2 \text{ or } x=3 == x\in\{1,2,3\}
        \pm 2 == 2,-2 == -2, 2 == x=\pm 2 == ±2
        1\pm\sqrt 2 == 1+\sqrt2, 1-\sqrt2
        (1,2),(3,4) == (3,4),(1,2) == (1,2)\text{ and }(3,4) == \{(1,2),(3,4)\}
        AB=9, CD=4 == CD=4, AB=9
        \{1\pm\sqrt{5},-2\} == -2,1+\sqrt5,1-\sqrt5
        100, 200, 300 == 300, 200, 100
        \emptyset == \varnothing == \{\} == ∅""",
    "tuples and intervals": r"""
        (2,3) == (2, 3) == \left( 2,\ 3 \right) == (2.0,\frac{6}{2}) == \bigl(2,3\bigr)
        [0,1) == \left[0,1\right) == x\in[0,1) == [0,\, 1)
        (-\infty,5)\cup(5,\infty) == (5,+\infty)\cup(-\infty,5) == (-∞,5)∪(5,∞)
        (-\infty,5)\cup(5,\infty) == x \in (-\infty, 5) \cup (5, \infty)
        \left(6, \frac{\pi}{3}\right) == (6,π/3)
        (45^\circ, 60^\circ) == (45,60)
        (12,345) == (12, 345.0) == \left(12,345\right)
        \mathbb{R} == (-\infty,\infty) == x\in ℝ
        V_1:V_2 = 11:21 == 11:21
        (x,y)=(1,2) == (1,2)""",
    "matrices": r"""
        \begin{pmatrix}1\\2\end{pmatrix} == \begin{bmatrix}1\\2\end{bmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix} 1 \\[2pt] 2.0 \\ \end{pmatrix}
        \begin{pmatrix}301&100\\x&2\end{pmatrix} == \begin{matrix} 301 & 100 \\ x & 2 \end{matrix}
        \begin{pmatrix}1\\2\end{pmatrix} == \left(\begin{array}{c}1\\2\end{array}\right)
        \frac15\begin{pmatrix}1&0\\2&-1\end{pmatrix} == \begin{bmatrix}1/5&0\\.4&-.2\end{bmatrix}
        \left[\begin{array}{cc}1&2\\3&x\end{array}\right] == \begin{matrix}1&2\\3&x\end{matrix}""",
    "ratios and bases": r"""
        1:2 == 1 : 2 == \frac22:2 == 1\colon 2 == 1\text{ to }2
        204_5 == 204_{5} == (204)_5 == 204_{\text{5}} == 204₅
        24_{10} == 24""",
    "choices and words": r"""
        \text{(C)} == C == (C) == \textbf{(C)} == \mathrm{C} == C. == C) == \text{C} == (\text{C})
        \text{even} == even == Even == \textbf{even} == \mathrm{even} == \text{ even. }
        \text{two lines} == Two lines
        \text{May} == May
        \text{A, D, F} == F, D, A
        LQSX == \text{LQSX}
        \text{e} == e
        \text{5n+10} == 5n+10 == \mathbf{5n+10} == \text{10 + 5n.}
        n(n-1)/2 == \boldsymbol{n(n-1)/2} == \frac{n^2-n}{2}""",
    "what models put around an answer": r"""
        **118** == 118 == \textbf{118}
        **\frac{5}{7}** == \frac57
        **(2, 3)** == (2,3)
        B == B) 41 == B: the lighter one == B. the lighter one == \text{B: it floats}
        B == \text{B) 41}
        D == \text{(D) } 3\pi == \textbf{(D)}\ 3\pi == \textbf{(D)} 3\pi == \text{(D) it melts}""",
    "escaped once too often": r"""
        (3, \\frac{2}{9}] == (3,\frac29]
        \\left\\{ 1, \\sqrt{7} \\right\\} == \{\sqrt7,1\}
        \\begin{pmatrix} 1 \\\\ x \\end{pmatrix} == \begin{pmatrix}1\\x\end{pmatrix}
        45\\% == 45%""",
    "same tokens": r"""
        \sum_{k=1}^n k == \sum_{k=1}^n  k\,
        \int_0^1 f\,dx == \int_0^1 f dx""",
}
UNEQUAL = {
    "numbers": r"""
        0.\overline{3} != 0; 1.\overline{27} != 1; 0.\bar 3 != 3; 25!+1 != 25!
        \lfloor 5.5\rfloor != 6
        2 != 3; 5 != -5; .2 != 2; 2.5 != 25; 12 != 1 2; 21/2 != 2 1/2; 12 != 21; \frac12 != 12
        \frac{1}{2} != \frac{2}{1}; 1,234 != 1,235
        1000 != 1,00; 100,000 != 100; 0.5 != -0.5; \frac123 != \frac32; 5/0 != 5; 0/0 != 0; \text{.5} != 5
        7 != 7.0000001; {3 \over 4} != 3; {n \choose 2} != n; 5^{\text{th}} != 5; 5 million != 5
        0 != \emptyset; 6! != 6; 2\frac54 != \frac{13}{4}; 2 5/4 != 3.25""",
    "tiny and huge": r"""
        1.6e-19 != 1.6e-18; 1.6e-19 != 1.7e-19; 0.0000672 != 0.0000673
        \frac{1}{2004!} != \frac{1}{2006!}
        10^{100} != 10^{100}+1
        99999999999999999999 != 100000000000000000000; 10^{40}+\pi != 10^{40}; 1e-300 != 0
        e^{-100} != 0
        2^{1009} != 2^{1010}
        1000000.1 != 1000000; 8.7e8 != 8.7""",
    "rounded": r"""
        0.3333 != \frac13; 0.33 != \frac13; 0.333333 != \frac13; 3.14 != \pi; 3.1416 != \pi
        1.41 != \sqrt2
        0.3333333333 != \frac13; 0.66666667 != \frac23; 3.141592654 != \pi; 1.41421 != \sqrt2
        3.1416 != \frac{22}{7}; 12345.6789 != 12345.67891""",
    "guesses": r"""
        3 ?? 4 ?? 5 != 5; 2? 3? 17 != 17; ??? 5 != 5; 5 or 6 != 5; 5, 6 != 6; 5,6 != 56
        \{5,6\} != 5
        \pm 2 != 2; 1\pm\sqrt2 != 1+\sqrt2; \frac12, 5 != 5
        5, \approx 6 != 5; 5, 6\approx 7 != 5
        x=5, y=6 != 5; 4\text{ or }5 != 5; \text{not }5 != 5""",
    "brackets": r"""
        (1,2) != (2,1); (1,2) != [1,2]; (1,2) != (1,2]; [1,2) != (1,2]; (1,2) != 1,2
        (1,2) != \{1,2\}
        [1,2] != \{1,2\}; (8,-2) != [8,-2]
        (31,250) != 31250; (3) != (3,3)
        (0,1)\cup(2,3) != (0,1)\cap(2,3); (0,1)\cup(2,3) != (0,1); (-\infty,5) != (-\infty,5]
        \langle 1,2\rangle != (1,2)""",
    "lists": r"""
        1,1,2 != 1,2,2; \{86,400\} != 86,400; 1,1,2 != 1,2; 1,2 != 1,2,3; 2,1 != 1,2,1
        a=2,b=3 != a=3,b=2; a=2,b=3 != 3,2
        (1,2),(3,4) != (1,2),(4,3)
        \text{A,B} != \text{A,C}""",
    "bases and ratios": r"""
        204_5 != 204; 204_5 != 204_6; 204_5 != 54; 4343_6 != 4343_7; \frac12_{10} != \frac12; 1:4 != \frac14
        1:4 != 4:1; 1:4 != 2:8; 5:00 != 15:00
        8:34\text{ a.m.} != 8:34\text{ p.m.}""",
    "percent and units": r"""
        28\% != 0.28; 28\% != 2800; 5 cm != 5 m; 5\text{ cm} != 5\text{ km}
        5\text{ cm}^2 != 5\text{ cm}
        5\text{ million} != 5; 5\text{ thousand} != 5; 5 cm, 3 != 5 m, 3; 5 kg/m^2 != 5 kg/m^3
        90\text{ units}1 != 90; 14\frac{6}{7}1 != 14\frac67; 3\text{ cm}\pi != 3; 10\% != 10^\circ
        \tan 15 != \tan 15^\circ; 2\text{ hours} != 2\text{ minutes}; x\text{ if }x>0 != x>0""",
    "relations": r"""
        x>3 != (3,\infty); x>3 != x\ge 3; x>3 != x<3; x>3 != 3; y=2x+3 != y=2x-3
        y=2x+3 != 2t+3; x=5 != y=5
        2x+z=1 != 1; x+y=5 != 5
        x^2+121=0 != x^2+121=1; f(x)=x != f(x)=2x; x_1=1 != x_2=1; 0=0 != 1=1; 2=4 != 1=3
        m a + b v = f != m a + b v""",
    "expressions": r"""
        x^2 != x^3; x+1 != x-1; 2x != 2y; \sin x != \cos x; \sqrt{3} != \sqrt{5}
        \sqrt[3]{2} != \sqrt{2}
        \pi != 3\pi; i != -i; -x^2 != (-x)^2; \sqrt{x^2} != x; \sqrt{(y-1)^2} != y-1; |-x^3| != -x^3
        \sqrt{x^2y^2} != xy; \sqrt{x^2 z^2} != xz; \sqrt{x^2y^2z^2} != xyz; \sqrt{x^4 y^2} != x^2y
        \sqrt{xy} != \sqrt{x}\sqrt{y}; \sqrt{y^2} != y; \sqrt{z^2} != z
        |n(n-1)| != n(n-1); |12-p| != 12-p; |(a+5)(b+2)| != (a+5)(b+2); x^2\frac12 != x^{5/2}
        |x^4-4x^3+x^2+6x+2| != x^4-4x^3+x^2+6x+2
        f(2x) != 2f(x); f() != f(x); |xy| != xy; x=x^2 != x^2
        \lfloor x\rfloor != 0
        \frac{1}{2}x != \frac{1}{2x}; 2^{3x} != 2^{3}x; |x| != x; \lfloor x\rfloor != x
        \lfloor n/8\rfloor != \lfloor (n+1)/8\rfloor; \lfloor n/4\rfloor != \lfloor (n+1)/4\rfloor
        \lfloor n/2\rfloor != \lceil n/2\rceil; n! != n; x_1 != x_2
        \ln 2 != \log_{10}2; \log_2 3 != \log_3 2; e != \pi; f(x,y) != f(y,x)
        \infty != -\infty; I(0) != 0""",
    "matrices": r"""
        \begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\1\end{pmatrix}
        \begin{pmatrix}1&2\end{pmatrix} != \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} != (1,2)
        \begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{vmatrix}1&2\\3&4\end{vmatrix}""",
    "words": r"""
        C) 12 != D; C) 12 != 12; C) or D) != C; C: or D != C; C) 12 != C) 13; (C) + 1 != C
        (C)^2 != C
        \text{(C)}^2 != C; \text{(C)} \cdot 5 != C; \text{(C)} \text{ or } 5 != C; C:D != C
        C=12 != C
        \text{x/y} != x; **3** and **4** != 3; **3**4 != 3; \text{2k} != 2; +A != B
        A != B; \text{(A)} != \text{(B)}; A != a; A, B != A; \text{odd} != \text{even}; LQSX != LQXS
        \text{CBAD} != ABCD; \text{not even} != even
        \text{May} != \text{March}; \text{5 cats} != \text{6 cats}; \text{} != 5""",
}


def equal_groups(family):
    return [line.strip().split(" == ") for line in EQUAL[family].strip().splitlines()]


def unequal_pairs(family):
    lines = UNEQUAL[family].strip().splitlines()
    return [pair.split(" != ") for line in lines for pair in line.strip().split("; ")]


@pytest.mark.parametrize("family", EQUAL)
def test_equal(family):
    pairs = [(a, group[0]) for group in equal_groups(family) for a in group]
    assert not [(a, b) for a, b in pairs if not (is_equal(a, b) and is_equal(b, a))]


@pytest.mark.parametrize("family", UNEQUAL)
def test_unequal(family):
    pairs = unequal_pairs(family)
    assert not [(a, b) for a, b in pairs if is_equal(a, b) or is_equal(b, a)]


def test_the_tables_are_a_few_hundred_pairs():
    assert sum(len(group) - 1 for family in EQUAL for group in equal_groups(family)) > 250
    assert sum(len(unequal_pairs(family)) for family in UNEQUAL) > 160


def test_mutually_different_answers():
    families = ("algebra", "equations", "inequalities", "lists", "matrices")
    answers = [group[0] for family in families for group in equal_groups(family)]
    answers += r"""x; 2x; 5; -5; \pi; e; i; (1,2); [1,2]; 1:2; \frac12; 11_2; 11; \text{no}; n; n!
        \sqrt2; 1.41; \infty; A; B; x^2; 2^x; x=1; x<1; |x|; \lfloor x\rfloor; (1,2,3)""".replace(
        "\n", ";").split(";")
    answers = list(dict.fromkeys(map(str.strip, answers)))
    pairs = itertools.combinations(answers, 2)
    assert not [(a, b) for a, b in pairs if is_equal(a, b)]


def test_a_bare_box_is_no_box_for_the_deployed_scope_either():
    text = r"\boxed{2} or \boxed </think> \boxed{3}"
    assert extract_answer(text, "before_think_end") == "2"


def test_gold_may_state_its_value_twice_but_the_prediction_may_not_hedge():
    assert is_equal("0.56", r"0.56 = 56\%") and is_equal(r"56\%", r"0.56 = 56\%")
    assert not is_equal("x = 5 = 6", "5") and not is_equal("5 = 6", "5")


def test_sympy_agrees():
    """Random expressions: other forms of them are equal, those with another coefficient are not."""
    import sympy

    draw, x, y = random.Random(0), *sympy.symbols("x y")
    for _ in range(60):
        a, b, c, d = (draw.randint(-9, 9) or 1 for _ in range(4))
        root = sympy.sqrt(draw.choice([2, 3, 5, 7, 12]))
        expression = draw.choice(
            [
                (a * x + b) * (c * y + d) + x ** draw.randint(2, 5),
                (x + a * root) ** 3 / c,
                (a * x + b) / (c * x + d),
                sympy.exp(a * x) * (b + root * sympy.I),
                sympy.sin(x + a) * root / (d * d + 1),
                (a + b * root) ** 3,
            ]
        )
        latex = sympy.latex(expression)
        for form in (
            sympy.expand(expression),
            sympy.factor(expression),
            sympy.together(expression),
            sympy.expand_trig(expression),
        ):
            assert is_equal(sympy.latex(form), latex), (form, latex)
        for other in (
            expression + sympy.Rational(1, 10**6),
            expression * sympy.Rational(10**7 + 1, 10**7),
            -expression,
            expression + y,
        ):
            assert not is_equal(sympy.latex(sympy.expand(other)), latex), (other, latex)


def test_random_numbers_agree_with_fractions():
    from fractions import Fraction

    draw = random.Random(1)
    for _ in range(500):
        low, high = 10 ** draw.randint(1, 9), 10 ** draw.randint(1, 9)
        value = Fraction(draw.randint(-low, high), draw.choice([1, 2, 4, 5, 8, 20, 1000]))
        other = value + Fraction(draw.choice([-1, 1]), draw.choice([1, 10, 1000, 10**6]))
        latex = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        decimal = f"{value.numerator * 1000 // value.denominator / 1000:.3f}"
        if Fraction(decimal) == value:
            assert is_equal(decimal, latex)
        assert not is_equal(f"{other.numerator}/{other.denominator}", latex)


# --------------------------------------------------------------------------------------------------
# Extraction and gold answers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{4} no, \boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x=\boxed{3}}", "3"),
        ("<think> \\boxed{7}", "7"),
        (r"\boxed{5} then 6", "5"),
        (r"\boxed{19}. Always write \boxed around it.", "19"),
        (r"\boxed{\frac{1}{3}} ... as asked, in \boxed", r"\frac{1}{3}"),
        (r"\boxed{6} is in \boxed{", None),
        (r"\boxed{4} \boxed{}", None),
        (r"\boxed{4} \boxed{5", None),
        (r"\boxed{  }", None),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        ("the answer is 5", None),
        ("", None),
        (r"\boxed{" + "1" * 5000 + "}", None),
        (r"\boxed{\{5}", r"\{5"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_extract_answer_scope():
    text = r"<think> \boxed{1} </think> \boxed{2}"
    assert extract_answer(text) == "2" and extract_answer(text, "before_think_end") == "1"
    assert extract_answer(r"</think> \boxed{2}", "before_think_end") is None
    assert extract_answer(r"\boxed{2 </think>}", "before_think_end") is None


@pytest.mark.parametrize(
    "raw, gold",
    [
        (27.0, "27"),
        (0.5, "0.5"),
        (12, "12"),
        (["x+1\n", "1+x"], "x+1"),
        ("It is so.\n#### 1,200", "1,200"),
        (r"Thus \boxed{8}.", "8"),
        ("", None),
        (None, None),
        ([], None),
        (float("nan"), None),
        ("z" * 3000, None),
        (r"[0, \\frac{1}{3})", r"[0, \\frac{1}{3})"),
        ("They were 31 more. #### $1,450", "$1,450"),
        (r"We get $\boxed{x=4}$. #### 4", "x=4"),
        ("She paid 45 euros for it.", None),
        ("The final answer is 6.", None),
        ("No, because it is even", None),
        ("ten red and nine blue marbles", None),
        (r"\text{There are no real solutions here}", None),
        (r"$f(x)=cx$, where $c$ is any constant", None),
        (r"\text{no real solutions}", r"\text{no real solutions}"),
        (r"14 \text{ right triangles}", r"14 \text{ right triangles}"),
        (r"x^{2} \text{ if } x>0", None),
        (r"so \boxed{", None),
    ],
)
def test_gold_answer(raw, gold):
    assert gold_answer(raw) == gold


# --------------------------------------------------------------------------------------------------
# Hostile input
# --------------------------------------------------------------------------------------------------


def hostile_inputs():
    many = 1900
    draw = random.Random(2)
    pieces = r"""\frac { } ( ) ^ _ x 2 9 ! \sqrt \sin + - \cdot [ ] , | \pi e i \text{a} = < \cup
        \pm / 10 \binom \lfloor \rfloor \log \{ \} 999 % : '
        \begin{pmatrix} \end{pmatrix} & \\ n π √ ²
        1\frac1{ f( """.split()
    return [
        "9" * many,
        "2^{" + "9" * 1000 + "}",
        "10^{10^{10^{10}}}",
        "9^{9^{9^{9^9}}}",
        "9" + "!" * 500,
        "((((9!)!)!)!)!",
        "100000!",
        "2^{2^{100}}",
        "1e999999999",
        "9e" + "9" * 500,
        "(" * 1000,
        "{" * many,
        r"\frac{" * 300,
        r"\sqrt{" * 300 + "2" + "}" * 300,
        "-" * many + "1",
        "x^" * 900,
        r"\sqrt{x+" * 38 + "1" + "}" * 38,
        r"1\frac1{" * 38 + "2" + "}" * 38,
        "+".join(["1"] * 299),
        "*".join(["99999"] * 290),
        r"\sin(" * 39,
        r"\binom{10^9}{5*10^8}",
        r"\binom{5000}{2500}^{100}",
        r"\lfloor 10^{300}\pi\rfloor",
        r"\tan(10^{40})",
        "e^{e^{e^{e^{e}}}}",
        "0^{-1}",
        r"\sqrt[10^9]{2}",
        r"\sqrt[0]{2}",
        r"\log_1 5",
        "(-1)^{10^{50}}",
        "(1+10^{-50})^{10^{50}}",
        r"\ln(0)",
        r"(\sqrt2)^{10^{20}}",
        "(n!)!",
        "+".join(rf"\frac{{3^{{{9000 + i}}}}}{{7^{{{9000 + i}}}}}" for i in range(40)),
        "+".join(f"x^{{{9000 + i}}}" for i in range(80)),
        "+".join(rf"\frac{{1}}{{{3000 + i}!}}" for i in range(80)),
        "n^{n^{n}}",
        "n!^{n!}",
        r"\sin x" * 140,
        r"\tan(n)+" * 110 + "(n-50)!",
        r"\pm 1" * 200,
        ",".join([r"\pm 1"] * 200),
        ",".join(rf"\sqrt{{{i}}}" for i in range(2, 150)),
        "1:" * 200 + "1",
        "1=" * 250 + "1",
        r"\cup".join(f"({i},{i + 1})" for i in range(80)),
        "1,000" + ",000" * 400,
        "1 000 " * 300,
        r"\text{" * 200 + "}" * 200,
        "x_{" * 200,
        r"\begin{pmatrix}" * 50,
        r"\begin{pmatrix}" + "1&" * 290 + r"1\end{pmatrix}",
        "5 " + "cm " * 400,
        "5" + r"\text{ trillion}" * 150,
        "\0",
        "5\0",
        "\ud800",
        "\U0010ffff" * 100,
        "\u202e5",
        "½" * 300,
        "²" * 1500,
        "√" * 1500,
        "π" * 590,
        "$" * many,
        "\\" * many,
        "&" * 600,
        '__import__("os").system("touch hacked")',
        "().__class__.__bases__",
        "eval(1)",
        "lambda: 5",
        "exec('x=5')",
        "{0.__class__}",
        "%s%n" * 50,
        "a" * 1_000_000,
        "{" * 100_000,
        r"\boxed{" * 100_000,
        "f()", "f(,)", r"\text{}", r"\frac{}{}", r"\sqrt[]{}", "x_", "x^", r"\log_",
        *("".join(draw.choices(pieces, k=draw.choice([5, 10, 30, 100, 400]))) for _ in range(400)),
    ]


GOLDS = [
    "5",
    "x^2+1",
    "(1,2)",
    r"\frac{1}{3}",
    "1,2,3",
    "n!",
    "x=5",
    r"\sqrt{2}",
    r"\text{A}",
    "[0,1)",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
]


def test_hostile_input_neither_hangs_nor_runs_nor_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paid, slow = [], []
    for text in hostile_inputs():
        started = time.process_time()
        for gold in (*GOLDS, f"({text}) + 0"):
            equal = is_equal(text, gold), is_equal(gold, text)
            paid += [(text[:40], gold)] if gold in GOLDS and any(equal) else []
        if time.process_time() - started > 2 * len(GOLDS):  # seconds: on average one per pair
            slow.append(text[:60])
    # 5 with a direction mark, and with 400 times the same unit, is 5
    assert {text for text, _ in paid} <= {"\u202e5", ("5 " + "cm " * 400)[:40]}
    assert not slow and not list(tmp_path.iterdir())


def test_hostile_input_needs_little_memory():
    # not ru_maxrss: it starts at what the parent, a pytest with torch loaded, held when it forked
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_grading as t\n"
        "[t.is_equal(h, g) for h in t.hostile_inputs() for g in t.GOLDS]\n"
        "status = open('/proc/self/status')\n"
        "print([line.split()[1] for line in status if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)),
    )
    assert int(done.stdout) < 200 * 1024


def test_nothing_is_raised_from_a_deep_stack_or_for_odd_types():
    def deep(n):
        return deep(n - 1) if n else is_equal("(" * 30 + "x" + ")" * 30, "x+0")

    for depth in (100, sys.getrecursionlimit() - 150):
        deep(depth)
    assert not is_equal(None, "5") and not is_equal("5", None)
    assert is_equal(5, "5") and is_equal(5.0, 5)


def test_same_verdicts_in_threads():
    pairs = [(rf"\sqrt{{{i}}}+\pi", rf"\pi+{i + i % 2}^{{1/2}}") for i in range(2, 60)]
    expected = [i % 2 == 0 for i in range(2, 60)]
    results = {}

    def grade(name):
        results[name] = [is_equal(a, b) for a, b in pairs]

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(verdicts == expected for verdicts in results.values()) and len(results) == 4


def test_no_evaluation_in_the_source():
    source = Path(rewards.__file__).read_text()
    for name in ("eval(", "exec(", "import sympy", "parse_expr", "sympify", "import torch"):
        assert name not in source
