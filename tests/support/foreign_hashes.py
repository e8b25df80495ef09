"""Hashes that other programs have written, all of one password."""

from __future__ import annotations

from dataclasses import dataclass

TYPED = "Zoë's blå häst vid ån"


@dataclass(frozen=True)
class Foreign:
    """A hash of `TYPED`.

    Attributes:
        scheme: What it is called.
        program: What has written it, with its version.
        hashed: The hash.
    """

    scheme: str
    program: str
    hashed: str


# Made with the lowest costs that each program takes. Werkzeug 3.1.9, Django 5.2.19 and 2.2.28,
# pwdlib 0.3.1, argon2-cffi 25.1.0, bcrypt 5.0.0 (4.0.1 below passlib), passlib 1.7.4, PHP 8.2.36,
# and of Node.js bcrypt 6.0.0 and bcryptjs 3.0.3.
CHEAP = (
    Foreign(
        "Argon2",
        "pwdlib (FastAPI Users)",
        "$argon2id$v=19$m=64,t=1,p=1$pKqFN35huB0LwRphU/5c7g"
        "$lea9qKA2jUVcBNSNXuA+ZY9ZpwdUxHemszI3UcVZQKo",
    ),
    Foreign(
        "Argon2",
        "passlib",
        "$argon2id$v=19$m=64,t=1,p=1$8V5rrbUWgnAOIYSwFmJMKQ"
        "$RwO2CmTTYmYKbw/pLJ9OY7EPQSoTvfAUIVlE+7pUdd0",
    ),
    Foreign(
        "Argon2",
        "PHP",
        "$argon2id$v=19$m=64,t=1,p=1$am9qdmdrTXo4OEMxL3J0WQ"
        "$myAs0OSE9+HBALm4TBZNcrjHWsUplYnVddQ7TBuj45g",
    ),
    Foreign(
        "Argon2",
        "argon2-cffi",
        "$argon2i$v=19$m=64,t=1,p=1$mloeUevQbb77ISpIP2y34w"
        "$quLXiZNhjk8NOOeQL+7emhkgxNiSyqoSpAAvAdZMR0w",
    ),
    Foreign(
        "Argon2",
        "argon2-cffi",
        "$argon2d$v=19$m=64,t=1,p=1$p2xoj8HmeNZtdu68Pq2kZg"
        "$GAFhoNgdbSIjcXLzjDAHyDCh/NOib2GDFOdYyIPnQ1U",
    ),
    Foreign(
        "bcrypt",
        "pwdlib (FastAPI Users)",
        "$2b$04$mvfyIFoMo4w8QnqqW8086eNUg/yIdAF/cIsdgCgHYzKxHge.64foa",
    ),
    Foreign(
        "bcrypt",
        "passlib",
        "$2b$04$knYF9RSpzqs8fhJ7viAYIu3Yctou5JfdhOHKSLd0mcuCj/CNVryPW",
    ),
    Foreign(
        "bcrypt",
        "bcrypt of Node.js",
        "$2b$04$GhtqoReIp07NG4VzOOAp/e5HGxoVdr4yWZRX/nzuH2Hi2HfmbQ.cC",
    ),
    Foreign(
        "bcrypt",
        "bcryptjs",
        "$2b$04$T22acxozV.RZy4foefsDYe6MuB/BYxMv6xScad3XPSVlHTWIvuCa2",
    ),
    Foreign(
        "bcrypt",
        "bcrypt of Node.js",
        "$2a$04$YsYfQcQs1A4GlvcUU6nXSOrbaHsT1uCqPd9MOdXqqRkwz.kT.OD8y",
    ),
    Foreign(
        "bcrypt",
        "PHP",
        "$2y$04$LoQXYm2W0DVpwF85FYLWx.4QluLdqaomaNlKCfBSBCRPT.u26NVBG",
    ),
    Foreign(
        "bcrypt",
        "passlib",
        "$2$04$yu5uGHu4QLMg5T/E0OO4Ae1RSZ0HAX1quGctCTFVLwSSk0Vq8hDE6",
    ),
    Foreign(
        "passlib bcrypt-SHA256",
        "passlib, version 2",
        "$bcrypt-sha256$v=2,t=2b,r=4$3fgx5T8CVEiV7hdWsdOGk.$NPid4/IyOl44Q4RH3WkvzxnLwuf81v6",
    ),
    Foreign(
        "passlib bcrypt-SHA256",
        "passlib, version 1",
        "$bcrypt-sha256$2b,4$mJu1eX/UKGxdeJNzZ0.r.O$rO3AjzQZL0aOjowSUwF1I2WK5lD9bkm",
    ),
    Foreign(
        "passlib bcrypt-SHA256",
        "passlib, version 1 of $2a$",
        "$bcrypt-sha256$2a,4$bc4F4UDQXhE4ZHAcRBBVQO$5CiUMYoDDHhpgJSNlfw/KSS0LnjMyui",
    ),
    Foreign(
        "passlib PBKDF2-SHA1",
        "passlib",
        "$pbkdf2$10$/d97T.ldq5Xy/h.j9D6H8A$EUjmQvYvWRRBUcBlhHvOF4TyTyA",
    ),
    Foreign(
        "passlib PBKDF2-SHA256",
        "passlib",
        "$pbkdf2-sha256$10$DSFkTIlxbk2p1Zqzdk5J6Q$oykuDLi5eevoxm3SkqZVUo/SmQDKMyVRmta7B3/3e0I",
    ),
    Foreign(
        "passlib PBKDF2-SHA512",
        "passlib",
        "$pbkdf2-sha512$10$AMDYO0dIyZkzhvB.T6lVKg"
        "$k70DdbiDHKvMksHGqDOfz7n/V4JdMX71vIgpQWWixDwLzmGaFj9S49i/jxKKTqQ6wSfReB5WwVlo1AIqT4HlhA",
    ),
    Foreign(
        "passlib scrypt",
        "passlib",
        "$scrypt$ln=4,r=8,p=2$tRZCqBXivJeydm6tNUboPQ$eOlYG54razlyQyC9FlGNLFN58+hMlVenTnzp725Ey68",
    ),
    Foreign(
        "Django PBKDF2-SHA256",
        "Django",
        "pbkdf2_sha256$10$opvdUrL1p4Sm9McfoeOfuI$K0ZimbDLGRDxsPbxol8zp0jkaljTipy4HL4nVXu7fzg=",
    ),
    Foreign(
        "Django PBKDF2-SHA256",
        "Django, with a salt that was chosen",
        "pbkdf2_sha256$10$sel de mer/+é$lOIdzZ3nMRYU4RxscCHR/iYdUX9+cJGp0UC/9yUB8hs=",
    ),
    Foreign(
        "Django PBKDF2-SHA1",
        "Django",
        "pbkdf2_sha1$10$Mpu2LAwD1tQRdsG9jY61L2$Q+Icd6iKDfSd7q6p9SeLmjEyJMo=",
    ),
    Foreign(
        "Django Argon2",
        "Django",
        "argon2$argon2id$v=19$m=64,t=1,p=2$OFpUQzZvS2ZiekNDR3dxSmhhcnprRw"
        "$Q3jtaYh8uDfdKZW2koB3tFfryS4ZYiI+uSaAaKFEH7o",
    ),
    Foreign(
        "Django Argon2",
        "Django 2.2",
        "argon2$argon2i$v=19$m=64,t=1,p=1$VzZJcEk3YXF2b2d0"
        "$b9UHZgye2G8slTLjmJCvlzI9ldVobUN+dRvQSGibC5c",
    ),
    Foreign(
        "Django bcrypt-SHA256",
        "Django",
        "bcrypt_sha256$$2b$04$tD8fTwq5VQ2Uz4qzaSQNoujGCXiEonNISgK85vEbqSZg8PE4EKA7y",
    ),
    Foreign(
        "Django bcrypt-SHA256",
        "Django",
        "bcrypt_sha256$$2a$04$n.EiBtwwmcDw2cDjlxKO2O.qTSdR7QKCyVbh.M9yjucstP.8K0ebG",
    ),
    Foreign(
        "Django bcrypt",
        "Django",
        "bcrypt$$2b$04$Zrjnzy5LOx4I71TWe.n.fOn5H/qqa5cqecSIKLdzdbSy6UeKLPkWS",
    ),
    Foreign(
        "Django bcrypt",
        "Django",
        "bcrypt$$2a$04$fZU53EVqwwQKpUc0.sn77exn2yU/1VmGLdPCK2ujFFKjVo5Ic2mH.",
    ),
    Foreign(
        "Django bcrypt",
        "PHP, taken over by Django",
        "bcrypt$$2y$04$LoQXYm2W0DVpwF85FYLWx.4QluLdqaomaNlKCfBSBCRPT.u26NVBG",
    ),
    Foreign(
        "Django scrypt",
        "Django",
        "scrypt$16$WBfLhsk2R36oUOxxoxvTo9$8$5$KuG0iyiPEkdHbRblSbi0J90posJ7KhgTPtOha5L6gKu2C5Ka"
        "POcIfIMw+ktZuxrQ1JXxxF2m7JvQt6gry9QBFQ==",
    ),
    Foreign(
        "Werkzeug scrypt",
        "Werkzeug",
        "scrypt:16:8:2$9ZpHHYJRvu45r3Q3$0db126671505703c5079cc70431602a1bd6fd996aeb62606fb29f9900"
        "fbbab550fa08325c5e587731883ab7c9f3216ccf4120dd3d423ae3f208923c18ae7b411",
    ),
    Foreign(
        "Werkzeug PBKDF2-SHA1",
        "Werkzeug",
        "pbkdf2:sha1:10$jPODDr8Ybb7ww3aL$3a327ed973a4305dc37e92b18672c09f13d13ea4",
    ),
    Foreign(
        "Werkzeug PBKDF2-SHA256",
        "Werkzeug",
        "pbkdf2:sha256:10$EAlzqL9m8EJLHCTl"
        "$8f6504962925452b579ee1c4d33d90c1966bbad63912d27a08474f5cb02dc2de",
    ),
    Foreign(
        "Werkzeug PBKDF2-SHA512",
        "Werkzeug",
        "pbkdf2:sha512:10$6KqLk1aCd9EicdlF$8f6c96df38c92975ce4df5ac4e17a521af4bade422cd036830e7f83"
        "1ea9df47c3b734096c41acb16d6ff90b46a41a522a6c02d49f654a40c2cc32911feac06b8",
    ),
)

BROKEN = "$2x$04$aaaaaaaaaaaaaaaaaaaaautH5GfabSVmYknQpAoZDNbGxfl3s3rNy"
"""Of `TYPED`, by ``crypt`` of PHP 8.2.36, which computes as crypt_blowfish did before 1.1."""

# Of the same programs, with the costs that they choose by default.
USUAL = (
    Foreign(
        "Argon2",
        "pwdlib (FastAPI Users)",
        "$argon2id$v=19$m=65536,t=3,p=4$dmYWP5TDHo3ENatDpzrcgQ"
        "$Tv8hXacEM5DABOAc1caDWjvBwRUtdg/ohTL7lNIlCuc",
    ),
    Foreign(
        "bcrypt",
        "pwdlib (FastAPI Users)",
        "$2b$12$p4vlBNvYD0/n.EHSTxK42uExITuCcWDdh77.i3Xc3HDM5QEF9Xn2m",
    ),
    Foreign(
        "passlib bcrypt-SHA256",
        "passlib",
        "$bcrypt-sha256$v=2,t=2b,r=12$FSlM7cKSdv4B5t6TE9fNde$P5km5m7dc3XPr4yKiojaSjY4qXfRgx.",
    ),
    Foreign(
        "passlib PBKDF2-SHA512",
        "passlib",
        "$pbkdf2-sha512$25000$9t4bY.xdS6n1/r8XYmxNyQ"
        "$8b3QREIQV0cUpN4D.pIP8WbC5MLU/zQwSXsCtKxJ8iknc2I/VwADxnIsPufiQ/DbRrEAn0m435YctCifMgTTOw",
    ),
    Foreign(
        "passlib scrypt",
        "passlib",
        "$scrypt$ln=16,r=8,p=1$IOScE6K0lhLCmHNOSUmpVQ$BWC+CPlJfe0a5SmhyCan8sO212euipqIJ9s6UPi0al8",
    ),
    Foreign(
        "Django PBKDF2-SHA256",
        "Django",
        "pbkdf2_sha256$1000000$kOevQWtp2o0HBFr5drlwAz$dB6UVWw5Hc12+Bh3JkxFExSTerl5CrUPOihIX8PCOAA=",
    ),
    Foreign(
        "Django Argon2",
        "Django",
        "argon2$argon2id$v=19$m=102400,t=2,p=8$Q3VURE9QU0kycWJLaFU5Um4yMEV1WA"
        "$FDEa5xlWkpFU9Lk8Ic0cpj0CjIyyJqOI825CgP93zHs",
    ),
    Foreign(
        "Django bcrypt-SHA256",
        "Django",
        "bcrypt_sha256$$2b$12$fIh89tRrIUeLY7sJuYgIKOBdsLDlcSCPN9U8.pe35.nQz1uZs/swi",
    ),
    Foreign(
        "Django scrypt",
        "Django",
        "scrypt$16384$UwpE0etis358dcHcT9KKZw$8$5$NsHAfhaY107ZEibag+/ycZIlhk1F6dXmQk+wdFLM0IklO9IJ"
        "3dGxFuYcLOSmbo6O2h1P9mykk+wI/g3FuwzQWA==",
    ),
    Foreign(
        "Werkzeug scrypt",
        "Werkzeug",
        "scrypt:32768:8:1$JtNgPTsfentqcibl$7a917990fb900cbaa60b87a5aad8330c3fa72c22c2c2d3e76ae2cc535"
        "e75e088dcf20e571449f09fa41d941217f6fdde77457dfeb3d317651294a637b4c2efed",
    ),
    Foreign(
        "Werkzeug PBKDF2-SHA256",
        "Werkzeug",
        "pbkdf2:sha256:1000000$naDIDWNvfMGcAKIj"
        "$c833638a6654c9124e455be929e690a373de2d8e79458b39f6af694852ba056c",
    ),
)

LONG = "x" * 100
OF_LONG = (
    "bcrypt_sha256$$2b$04$0ioqiQixIlG/bRfNANgTjOgBmS.uWoC9fzBbclsBhC1Gk86LBnXwq",
    "$bcrypt-sha256$v=2,t=2b,r=4$SPQbBYbQjJkrXbPLi/t1Ye$ZHpDZ4H/2Fp.ZGthdjdQx7nFwF9wDIq",
    "$bcrypt-sha256$2b,4$H2DJ2umygRv4Rns6PzYXsO$DeYH0VCqt8FCwl86mUtaBTLlCXWIdXS",
)
"""Of `LONG`, which bcrypt alone would cut off: by Django 5.2.19, and passlib 1.7.4 twice."""
LONG_CUT_OFF = "bcrypt$$2b$04$.4b3fu1KTqNjwcsjD/ioyeroxRJprWJDs5w8FoqN2x9KKZfx29auy"
"""Of `LONG`, by passlib 1.7.4 with bcrypt 4, which has cut it off."""
